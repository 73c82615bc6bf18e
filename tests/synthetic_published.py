"""Known evaluation sets as torchvision unpacks them, or their authors publish them: a writer for each.

A writer is given torchvision's root; images and labels are those of tests.synthetic_sets.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
import torchvision.datasets as published
from scipy.io import savemat

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders
from tests.making import write_text

if TYPE_CHECKING:
    from tests.synthetic_sets import Item, Items


def _put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _in_classes(base: Path, d: SetDefinition, items: list[Item], name: str) -> None:
    """Images in folders of their classes, those of each counted from 1 in their `name`."""
    for label, folder in enumerate(class_folders(d)):
        of_class = [item for item in items if item.said == label]
        for number, item in enumerate(of_class, 1):
            _put(base / folder / name.format(number), item.data)


def _caltech101(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "caltech101" / "101_ObjectCategories"
    _in_classes(base, d, items["test"], "image_{:04d}.jpg")
    (base / "BACKGROUND_Google").mkdir()


def _eurosat(d: SetDefinition, folder: Path, items: Items) -> None:
    _in_classes(folder / "eurosat" / "2750", d, items["test"], "image_{}.jpg")


def _country211(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, some in items.items():
        _in_classes(folder / "country211" / {"val": "valid"}.get(split, split), d, some, "{}.jpg")


def _rendered_sst2(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, some in items.items():
        _in_classes(folder / "rendered-sst2" / {"val": "valid"}.get(split, split), d, some, "{}.png")


def _imagenet1k(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, some in items.items():
        _in_classes(folder / {"test": "val"}.get(split, split), d, some, "ILSVRC2012_{:08d}.JPEG")


def _cifar(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / getattr(published, d.name.upper()).base_folder
    ten, key = d.name == "cifar10", "labels" if d.name == "cifar10" else "fine_labels"
    parts = {f"data_batch_{i + 1}": items["train"][i::5] for i in range(5)} if ten else {"train": items["train"]}
    for name, some in {**parts, ("test_batch" if ten else "test"): items["test"]}.items():
        data = np.stack([item.array() for item in some]).transpose(0, 3, 1, 2).reshape(len(some), -1)
        _put(base / name, pickle.dumps({"data": data, key: [item.said for item in some]}))
    _put(base / ("batches.meta" if ten else "meta"), pickle.dumps({"label_names": [], "fine_label_names": []}))


def _mnist(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, prefix in (("train", "train"), ("test", "t10k")):
        some = items[split]
        images = np.array([0x0803, len(some), 28, 28], ">u4").tobytes() + b"".join(i.array().tobytes() for i in some)
        labels = np.array([0x0801, len(some)], ">u4").tobytes() + bytes(item.said for item in some)
        _put(folder / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        _put(folder / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels)


def _fer2013(d: SetDefinition, folder: Path, items: Items) -> None:
    """The file counts angry, disgust, fear, happy, sad, surprise, neutral."""
    emotion = (0, 1, 2, 3, 6, 4, 5)
    usage = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
    rows = [
        f"{emotion[item.said]},{usage[split]},{' '.join(map(str, item.array().reshape(-1)))}"
        for split, some in items.items()
        for item in some
    ]
    write_text(folder / "fer2013" / "icml_face_data.csv", ["emotion, Usage, pixels", *rows])


def _patch_camelyon(d: SetDefinition, folder: Path, items: Items) -> None:
    (folder / "pcam").mkdir()
    for split, some in items.items():
        arrays = {"x": np.stack([i.array() for i in some]), "y": np.array([i.said for i in some], np.uint8)}
        for name, array in arrays.items():
            path = folder / "pcam" / f"camelyonpatch_level_2_split_{ {'val': 'valid'}.get(split, split) }_{name}.h5"
            with h5py.File(path, "w") as file:
                file[name] = array if name == "x" else array.reshape(-1, 1, 1, 1)


def _dtd(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "dtd" / "dtd"
    for split, some in items.items():
        lines = [f"{d.classes[i.said]}/{d.classes[i.said]}_{split}{n:04d}.jpg" for n, i in enumerate(some)]
        write_text(base / "labels" / f"{split}1.txt", lines)
        for line, item in zip(lines, some, strict=True):
            _put(base / "images" / line, item.data)


def _fgvc_aircraft(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "fgvc-aircraft-2013b" / "data"
    write_text(base / "variants.txt", class_folders(d))
    for number, (split, some) in enumerate(items.items()):
        keys = [f"{number:03d}{n:04d}" for n in range(len(some))]
        lines = [f"{key} {class_folders(d)[item.said]}" for key, item in zip(keys, some, strict=True)]
        write_text(base / f"images_variant_{split}.txt", lines)
        for key, item in zip(keys, some, strict=True):
            _put(base / "images" / f"{key}.jpg", item.data)


def _food101(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "food-101"
    for split, some in items.items():
        listed: dict[str, list[str]] = {name: [] for name in class_folders(d)}
        for number, item in enumerate(some):
            name = class_folders(d)[item.said]
            listed[name].append(f"{name}/{split}{number}")
            _put(base / "images" / f"{name}/{split}{number}.jpg", item.data)
        _put(base / "meta" / f"{split}.json", json.dumps(listed))


def _gtsrb(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "gtsrb"
    _in_classes(base / "GTSRB" / "Training", d, items["train"], "00000_{:05d}.ppm")
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, item in enumerate(items["test"]):
        lines.append(f"{number:05d}.ppm;48;32;5;5;40;30;{item.said}")
        _put(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", item.data)
    write_text(base / "GT-final_test.csv", lines)


def _flowers102(d: SetDefinition, folder: Path, items: Items) -> None:
    base, labels, ids = folder / "flowers-102", [], {}
    for split, some in items.items():
        ids[{"train": "trnid", "val": "valid", "test": "tstid"}[split]] = np.arange(len(some)) + len(labels) + 1
        for item in some:
            labels.append(item.said + 1)
            _put(base / "jpg" / f"image_{len(labels):05d}.jpg", item.data)
    savemat(base / "setid.mat", ids)
    savemat(base / "imagelabels.mat", {"labels": np.array(labels, np.uint8)})


def _oxford_pets(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "oxford-iiit-pet"
    for split, some in items.items():
        lines = [f"{class_folders(d)[item.said]}_{split}{n} {item.said + 1} 1 1" for n, item in enumerate(some)]
        write_text(base / "annotations" / {"train": "trainval.txt"}.get(split, "test.txt"), lines)
        for line, item in zip(lines, some, strict=True):
            _put(base / "images" / f"{line.split()[0]}.jpg", item.data)


def _stanford_cars(d: SetDefinition, folder: Path, items: Items) -> None:
    base = folder / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(d.classes, object)})
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.empty(len(items[split]), [("bbox_x1", object), ("class", object), ("fname", object)])
        for number, item in enumerate(items[split]):
            rows[number] = (np.uint8(5), np.uint8(item.said + 1), f"{number + 1:05d}.jpg")
            _put(base / f"cars_{split}" / f"{number + 1:05d}.jpg", item.data)
        savemat(base / path, {"annotations": rows})


def _voc2007(d: SetDefinition, folder: Path, items: Items) -> None:
    """Each image has one more object, which is marked as difficult."""
    base, first = folder / "VOCdevkit" / "VOC2007", 1
    for split, some in items.items():
        keys = [f"{first + number:06d}" for number in range(len(some))]
        first += len(some)
        write_text(base / "ImageSets" / "Main" / f"{split}.txt", keys)
        for label, name in enumerate(d.classes):
            marks = [1 if label in i.said else 0 if label == n % 20 else -1 for n, i in enumerate(some)]
            lines = [f"{key} {mark:2d}" for key, mark in zip(keys, marks, strict=True)]
            write_text(base / "ImageSets" / "Main" / f"{name}_{split}.txt", lines)
        for key, item in zip(keys, some, strict=True):
            _put(base / "JPEGImages" / f"{key}.jpg", item.data)


def _hateful_memes(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, name in (("train", "train"), ("test", "dev_seen")):
        rows = [{"img": f"img/{split}{n}.png", "label": item.said, "text": "x"} for n, item in enumerate(items[split])]
        write_text(folder / f"{name}.jsonl", [json.dumps(row) for row in rows])
        for row, item in zip(rows, items[split], strict=True):
            _put(folder / row["img"], item.data)
    write_text(folder / "test_seen.jsonl", ['{"img": "img/none.png", "text": "x"}'])


def _coco_captions(d: SetDefinition, folder: Path, items: Items) -> None:
    for start, (split, some) in enumerate(items.items()):
        year = "train2014" if split == "train" else "val2014"
        images = [
            {"id": start * 1000 + n, "file_name": f"COCO_{year}_{start * 1000 + n:012d}.jpg"} for n in range(len(some))
        ]
        said = [
            {"image_id": i["id"], "caption": text} for i, item in zip(images, some, strict=True) for text in item.said
        ]
        _put(folder / f"coco_{split}_karpathy.json", json.dumps({"images": images, "annotations": said[::-1][::-1]}))
        for image, item in zip(images, some, strict=True):
            _put(folder / year / image["file_name"], item.data)


def _flickr30k(d: SetDefinition, folder: Path, items: Items) -> None:
    for split, some in items.items():
        lines = [f"{split}{n}.jpg,{text}" for n, item in enumerate(some) for text in item.said]
        write_text(folder / f"flickr30k_{split}_karpathy.txt", ["image,caption", *lines])
        for number, item in enumerate(some):
            _put(folder / f"{split}{number}.jpg", item.data)


def _karpathy(d: SetDefinition, folder: Path, items: Items) -> None:
    """The file of the split's author; some of the training images are called restval there."""
    coco, rows = d.name == "coco_captions", []
    for split, some in items.items():
        for number, item in enumerate(some):
            place = ("train2014" if number % 2 and split == "train" else "val2014") if coco else "flickr30k-images"
            row = {"filename": f"{split}{number}.jpg", "sentences": [{"raw": text} for text in item.said]}
            part = "restval" if coco and split == "train" and number % 2 == 0 else split
            rows.append({**row, "split": part, **({"filepath": place} if coco else {})})
            _put(folder / place / row["filename"], item.data)
    _put(folder / ("dataset_coco.json" if coco else "dataset_flickr30k.json"), json.dumps({"images": rows}))


WRITERS: dict[str, Callable[[SetDefinition, Path, Items], None]] = {
    "karpathy": _karpathy,
    "caltech101": _caltech101,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "coco_captions": _coco_captions,
    "country211": _country211,
    "dtd": _dtd,
    "eurosat": _eurosat,
    "fer2013": _fer2013,
    "fgvc_aircraft": _fgvc_aircraft,
    "flickr30k": _flickr30k,
    "flowers102": _flowers102,
    "food101": _food101,
    "gtsrb": _gtsrb,
    "hateful_memes": _hateful_memes,
    "imagenet1k": _imagenet1k,
    "mnist": _mnist,
    "oxford_pets": _oxford_pets,
    "patch_camelyon": _patch_camelyon,
    "rendered_sst2": _rendered_sst2,
    "stanford_cars": _stanford_cars,
    "voc2007": _voc2007,
}


def trust(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make torchvision, and whoever reads with it, take the files in `folder` for those whose md5 it knows."""

    there = {f"{path.parent.name}/{path.name}": path for path in folder.rglob("*")}

    def known(name: str, md5: str, base: str) -> tuple[str, str]:
        found = there.get(f"{base}/{name}")
        return name, hashlib.md5(found.read_bytes()).hexdigest() if found else md5

    for kind in (published.CIFAR10, published.CIFAR100):
        for files in ("train_list", "test_list"):
            patch.setattr(kind, files, [known(*entry, kind.base_folder) for entry in getattr(kind, files)])
        meta = known(kind.meta["filename"], kind.meta["md5"], kind.base_folder)
        patch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    others = ((published.FER2013, "_RESOURCES", "fer2013"), (published.Flowers102, "_file_dict", "flowers-102"))
    for owner, name, base in others:
        patch.setattr(owner, name, {part: known(*entry, base) for part, entry in getattr(owner, name).items()})
