"""Sets as their authors publish them and torchvision unpacks them: files that list images and labels.

Sets that are published as raw arrays are unpacked by datasets.raw_arrays. A reader is given the set's folder, which is
torchvision's own or the one around it.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cache_schemas.evaluation import SetDefinition
from cache_schemas.plan import SourceFile
from dimefm.datasets.definitions import class_folders, class_names
from dimefm.datasets.folder_layout import read_folders
from dimefm.datasets.image_set import Records, local_image
from dimefm.datasets.layouts import Reader, name_lookup
from dimefm.datasets.raw_arrays import RAW, read_raw
from dimefm.errors import SourceError
from dimefm.system import storage

_Listed = Iterable[tuple[Path, Any]]
"""Image files, each with a label, the name of a class folder, several labels, or captions."""

_DAMAGED = (
    *(OSError, LookupError, ValueError, TypeError, AttributeError, csv.Error, zlib.error),
    MemoryError,  # for an array whose header claims petabytes
)
"""What reading a list raises if files are missing, cut short, or something else."""


def reader_of(name: str, unpacked: str) -> Reader | None:
    """The reader of the layout that this set alone has; None for a set without one."""
    if name in RAW:
        return partial(read_raw, name, unpacked)
    if name in _FOLDERS:
        return partial(_read_subfolder, _FOLDERS[name])
    if name in _LISTS:
        return partial(_read_list, *_LISTS[name])
    return None


_FOLDERS = {
    "caltech101": ("caltech101/101_ObjectCategories", "101_ObjectCategories"),
    "country211": ("country211",),
    "eurosat": ("eurosat/2750", "2750"),
    "rendered_sst2": ("rendered-sst2",),
}
"""Where torchvision keeps the splits or class folders of a set, within the set's folder. ImageNet's lie directly in it,
which is the general layout of class folders."""


def _read_subfolder(
    places: tuple[str, ...], folder: str, split: str, definition: SetDefinition | None
) -> Records | None:
    if storage.is_url(folder):
        return None
    base = next((f"{folder}/{place}" for place in places if Path(folder, place).is_dir()), None)
    return read_folders(base, split, definition) if base is not None else None


def _read_list(
    inner: str,
    read_list: Callable[[Path, str], _Listed | None],
    folder: str,
    split: str,
    definition: SetDefinition | None,
) -> Records | None:
    """Images and labels as `read_list` gives them for the set's folder, its folder `inner`, or `inner`/`inner`: DTD's
    archive holds a folder with the name that torchvision gives to its own."""
    if storage.is_url(folder):
        return None
    for base in (Path(folder), Path(folder, inner), Path(folder, inner, inner)):
        try:
            listed = read_list(base, split)
        except _DAMAGED as error:
            what = f"{base}: its list of images cannot be read: {type(error).__name__}: {error}"
            raise SourceError(what, remedy="fetch the set again") from error
        if listed is not None:
            return _listed_records(base, list(listed), definition)
    return None


def _listed_records(base: Path, listed: list[tuple[Path, Any]], definition: SetDefinition | None) -> Records:
    paths, annotations = zip(*listed, strict=True) if listed else ((), ())
    samples = [local_image(str(path), str(base)) for path in paths]
    if samples and all(sample.size < 0 for sample in samples):
        what = f"{base} lists {len(samples):,} images, and none of them exists, such as {paths[0]}"
        raise SourceError(what, remedy="unpack the images beside the list")
    files = [SourceFile(str(p), s.size, 0) for p, s in zip(paths, samples, strict=True)]
    records = Records(where=str(base), layout="torchvision", samples=samples, files=files)
    if definition is not None and definition.task == "retrieval":
        records.captions = [list(captions) for captions in annotations]
    elif definition is not None:
        records.names = class_names(definition)
        by_name = bool(annotations) and isinstance(annotations[0], str)
        records.labels = _labels_of_names(base, annotations, definition) if by_name else list(annotations)
    return records


def _labels_of_names(base: Path, names: Sequence[str], definition: SetDefinition) -> list[int]:
    """The label of each name of a class or class folder. Raises SourceError for a name that is neither."""
    look_up = name_lookup([*enumerate(class_names(definition)), *enumerate(class_folders(definition))])
    labels = {name: look_up(name) for name in set(names)}
    for name in names:
        if labels[name] is None:
            what = f"{base} lists an image of {name!r}, which is no class of {definition.title}"
            raise SourceError(what, remedy="fetch the set again")
    return [label for name in names if (label := labels[name]) is not None]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _load_mat(path: Path) -> Any:
    """The arrays of a .mat file by name. Raises ValueError for a damaged one."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(path, squeeze_me=True)
    except MatReadError as error:
        raise ValueError(str(error)) from error


def _dtd(base: Path, split: str) -> _Listed | None:
    path = base / "labels" / f"{split}1.txt"
    return [(base / "images" / x, x.partition("/")[0]) for x in _lines(path)] if path.exists() else None


def _fgvc_aircraft(base: Path, split: str) -> _Listed | None:
    path = base / "data" / f"images_variant_{split}.txt"
    if not path.exists():
        return None
    pairs = (line.split(" ", 1) for line in _lines(path))
    return [(base / "data" / "images" / f"{image}.jpg", variant.strip()) for image, variant in pairs]


def _food101(base: Path, split: str) -> _Listed | None:
    path = base / "meta" / f"{split}.json"
    if not path.exists():
        return None
    listed = json.loads(path.read_text(encoding="utf-8"))
    return [(base / "images" / f"{image}.jpg", name) for name in sorted(listed) for image in listed[name]]


def _gtsrb(base: Path, split: str) -> _Listed | None:
    if split == "train":
        training = next((p for p in (base / "GTSRB" / "Training", base / "Training") if p.is_dir()), None)
        return [(path, int(path.parent.name)) for path in sorted(training.glob("*/*.ppm"))] if training else None
    path = base / "GT-final_test.csv"
    if split != "test" or not path.exists():
        return None
    images = next((p for p in (base / "GTSRB", base) if (p / "Final_Test").is_dir()), base) / "Final_Test" / "Images"
    with path.open(newline="", encoding="utf-8") as file:
        return [(images / row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";")]


def _flowers102(base: Path, split: str) -> _Listed | None:
    path = base / "setid.mat"
    if not path.exists():
        return None
    ids = _load_mat(path)[{"train": "trnid", "val": "valid", "test": "tstid"}[split]]
    labels = _load_mat(base / "imagelabels.mat")["labels"]
    return [(base / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in _integers(ids)]


def _oxford_pets(base: Path, split: str) -> _Listed | None:
    path = base / "annotations" / {"train": "trainval.txt", "test": "test.txt"}.get(split, "")
    if not path.is_file():
        return None
    names = [line.split()[0] for line in _lines(path) if not line.startswith("#")]
    return [(base / "images" / f"{name}.jpg", name.rpartition("_")[0]) for name in names]


def _stanford_cars(base: Path, split: str) -> _Listed | None:
    lists = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    path = base / lists.get(split, "")
    if not path.is_file():
        return None
    rows = _load_mat(path)["annotations"]
    pairs = zip(_names(rows["fname"]), _integers(rows["class"]), strict=True)
    return [(base / f"cars_{split}" / name, label - 1) for name, label in pairs]


def _voc2007(base: Path, split: str) -> _Listed | None:
    """An object that is marked as difficult (0 in the list of a class) does not give its image that class."""
    base = base / "VOC2007" if (base / "VOC2007").is_dir() else base
    lists = base / "ImageSets" / "Main"
    if not (lists / f"aeroplane_{split}.txt").exists():
        return None
    of_image: dict[str, list[int]] = {}
    for place, name in enumerate(_VOC_CLASSES):
        marks = dict(line.split() for line in _lines(lists / f"{name}_{split}.txt"))
        if place == 0:
            of_image = {image: [] for image in marks}
        if list(marks) != list(of_image):
            raise ValueError(f"{name}_{split}.txt does not have the images of the other classes")
        for image, mark in marks.items():
            of_image[image].extend([place] if mark == "1" else [])
    return [(base / "JPEGImages" / f"{image}.jpg", labels) for image, labels in of_image.items()]


_VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _hateful_memes(base: Path, split: str) -> _Listed | None:
    names = {"train": ("train.jsonl",), "test": ("dev_seen.jsonl", "dev.jsonl")}.get(split, ())
    path = next((base / name for name in names if (base / name).exists()), None)
    return [(base / row["img"], int(row["label"])) for row in map(json.loads, _lines(path))] if path else None


def _karpathy(path: Path, split: str, images: Sequence[Path]) -> _Listed:
    """From Karpathy's dataset_*.json, which has the split and the sentences of each image."""
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    folder = next((place for place in images if place.is_dir()), path.parent)
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["images"] if row["split"] in wanted]
    return [(folder / row.get("filepath", "") / row["filename"], [s["raw"] for s in row["sentences"]]) for row in rows]


def _coco(base: Path, split: str) -> _Listed | None:
    """From dataset_coco.json, or from a captions file in COCO's own format for Karpathy's split."""
    if (base / "dataset_coco.json").exists():
        return _karpathy(base / "dataset_coco.json", split, (base,))
    path = base / f"coco_{split}_karpathy.json"
    if not path.exists():
        return None
    published = json.loads(path.read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {}
    for one in published["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    places = [base / name for name in ("val2014", "train2014", "images", "")]

    def path_of(name: str) -> Path:
        return next((place / name for place in places if (place / name).exists()), places[0] / name)

    return [(path_of(one["file_name"]), captions.get(one["id"], [])) for one in published["images"]]


def _flickr30k(base: Path, split: str) -> _Listed | None:
    """From dataset_flickr30k.json, or the lines ``IMAGE.jpg,CAPTION`` of flickr30k_SPLIT_karpathy.txt."""
    places = [base / name for name in ("flickr30k-images", "flickr30k_images", "Images", "images")]
    if (base / "dataset_flickr30k.json").exists():
        return _karpathy(base / "dataset_flickr30k.json", split, places)
    path = base / f"flickr30k_{split}_karpathy.txt"
    if not path.exists():
        return None
    captions: dict[str, list[str]] = {}
    for line in _lines(path)[1:]:
        image, mark, caption = line.partition(".jpg,")
        if not mark:
            raise ValueError(f"line {line[:60]!r} is not IMAGE.jpg,CAPTION")
        captions.setdefault(f"{image}.jpg", []).append(caption.strip())
    folder = next((place for place in places if place.is_dir()), base)
    return [(folder / image, texts) for image, texts in captions.items()]


def _integers(values: Any) -> list[int]:
    """The integers of a MATLAB vector, which is a plain number if it has length one."""
    return [int(v) for v in values.reshape(-1)] if hasattr(values, "reshape") else [int(values)]


def _names(values: Any) -> list[str]:
    """The strings of a MATLAB vector, which is a plain string if it has length one."""
    return [str(v) for v in values.reshape(-1)] if hasattr(values, "reshape") else [str(values)]


# By set: torchvision's folder for it, and the function that reads its list.
_LISTS: dict[str, tuple[str, Callable[[Path, str], _Listed | None]]] = {
    "dtd": ("dtd", _dtd),
    "fgvc_aircraft": ("fgvc-aircraft-2013b", _fgvc_aircraft),
    "food101": ("food-101", _food101),
    "gtsrb": ("gtsrb", _gtsrb),
    "flowers102": ("flowers-102", _flowers102),
    "oxford_pets": ("oxford-iiit-pet", _oxford_pets),
    "stanford_cars": ("stanford_cars", _stanford_cars),
    "voc2007": ("VOCdevkit", _voc2007),
    "hateful_memes": ("hateful_memes", _hateful_memes),
    "coco_captions": ("coco", _coco),
    "flickr30k": ("flickr30k", _flickr30k),
}
