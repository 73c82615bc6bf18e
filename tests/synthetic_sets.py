"""Tiny copies of the known sets, in every layout that a definition names.

The files are as the publishers of a set write them, with a dozen small images. No two are alike, so that an image that
was read can be recognised by its pixels. Layouts have variants, here called forms: see `forms_of`.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names, load_definitions, templates
from dimefm.datasets.image_set import ImageSet
from dimefm.sources.read_image import read_encoded
from tests.making import encoded, picture, write_parquet, write_tar, write_text
from tests.synthetic_published import WRITERS

IMAGES = 12
FORMS = {
    "webdataset": ("webdataset", "flat"),
    "parquet": ("parquet", "parquet-numbers", "parquet-names"),
    "folders": ("folders",),
    "torchvision": ("torchvision",),
    "original": ("original",),
}
ARRAYS = {  # sets that are published as arrays: width, height and mode
    "cifar10": (32, 32, "RGB"),
    "cifar100": (32, 32, "RGB"),
    "fer2013": (48, 48, "L"),
    "mnist": (28, 28, "L"),
    "patch_camelyon": (96, 96, "RGB"),
}
AMBIGUOUS = {  # two of ImageNet's class names stand for two classes each
    name for name, d in load_definitions().items() if len(set(class_names(d))) < d.class_count
}
SPLITS = {  # of what torchvision unpacks, where those are not the splits of the definition
    "caltech101": ("test",),
    "eurosat": ("test",),
    "gtsrb": ("train", "test"),
}


@dataclass(frozen=True)
class Item:
    """One image: its file, and its label, its labels, or its captions (`said`)."""

    data: bytes
    said: Any

    def pixels(self) -> bytes:
        """Its pixels, which do not depend on the kind of file."""
        return pixels(self.data)

    def array(self) -> np.ndarray[Any, Any]:
        """uint8 (H, W, 3), or (H, W) of a grey one."""
        return np.asarray(Image.open(io.BytesIO(self.data)))


Items = dict[str, list[Item]]


def pixels(data: bytes) -> bytes:
    """The RGB pixels of an encoded image, which no two images of these sets share."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def as_read(images: ImageSet, missing: bool = False) -> dict[bytes, Any]:
    """The label, labels or captions of each image, by its pixels; with `missing`, of the images that exist."""
    there = [not missing or Path(sample.file).is_file() for sample in images.samples]
    samples = [sample for sample, kept in zip(images.samples, there, strict=True) if kept]
    seen = [pixels(read_encoded(sample)) for sample in samples]
    if images.captions is not None:
        said: list[Any] = list(images.captions)
    elif images.class_labels.ndim == 2:
        said = [tuple(np.flatnonzero(row).tolist()) for row in images.class_labels]
    else:
        said = images.class_labels.tolist()
    said = [one for one, kept in zip(said, there, strict=True) if kept]
    assert len(set(seen)) == len(seen)
    return dict(zip(seen, said, strict=True))


def as_written(items: Items, split: str = "test") -> dict[bytes, Any]:
    """What `as_read` should give."""
    return {item.pixels(): item.said for item in items[split]}


def forms_of(definition: SetDefinition) -> list[str]:
    """The forms of its layouts. A list of captions has no numbers, and several labels have no
    single name."""
    forms = [form for layout in definition.layouts for form in FORMS[layout]]
    without = {"retrieval": "parquet-numbers", "multilabel": "parquet-names"}.get(definition.task)
    karpathy = ["karpathy"] if definition.task == "retrieval" else []
    return [form for form in forms if form != without] + karpathy


def layout_of(form: str) -> str:
    """The layout that a form is of."""
    return next((layout for layout, forms in FORMS.items() if form in forms), "torchvision")


def write_set(name: str, form: str, folder: Path, images: int = IMAGES) -> Items:
    """Write a set into `folder` (torchvision's root if the form is torchvision's). Return its items by split."""
    definition = load_definitions()[name]
    splits = SPLITS.get(name, tuple(definition.splits)) if form == "torchvision" else tuple(definition.splits)
    items = {split: _items(definition, split, form, images) for split in splits}
    folder.mkdir(parents=True, exist_ok=True)
    writer = _WRITERS.get(form) or WRITERS.get(form if form == "karpathy" else name)
    assert writer, f"{name} has the layout {form}: add a function that writes it to tests/synthetic_published.py"
    writer(definition, folder, items)
    return items


def missing_images(definition: SetDefinition, split: str = "test") -> list[str]:
    """What `partial` says of the number of images in a tiny copy: nothing of a set that is published as small."""
    published = definition.splits[split]
    return [] if published == IMAGES else [f"{IMAGES} of {published} images"]


def labels_of(definition: SetDefinition, split: str, images: int = IMAGES) -> list[Any]:
    """Labels from the first class to the last, in random order. Where an image may have several, one has none."""
    rng = np.random.default_rng(zlib.crc32(f"{definition.name} {split}".encode()))
    if definition.task == "retrieval":
        return [tuple(f"{split} {i}, a “caption” no. {k}" for k in range(1 + i % 3)) for i in range(images)]
    spread = rng.permutation(np.linspace(0, definition.class_count - 1, images).round().astype(int)).tolist()
    if definition.task == "multilabel":
        return [tuple(sorted({label, *spread[i + 1 : i + 3]})) if i else () for i, label in enumerate(spread)]
    return list(spread)


def _items(definition: SetDefinition, split: str, form: str, images: int) -> list[Item]:
    width, height, mode = ARRAYS.get(definition.name, (60, 20, "RGB"))
    kind = {"webdataset": "WEBP", "torchvision": "JPEG", "original": "PNG"}.get(form, "JPEG")
    if form == "torchvision":
        kind = {"gtsrb": "PPM", **dict.fromkeys(("rendered_sst2", *ARRAYS), "PNG")}.get(definition.name, kind)
    items = []
    for i, said in enumerate(labels_of(definition, split, images)):
        seed = zlib.crc32(f"{definition.name} {split} {i}".encode())
        colour = (40 + seed % 160, 40 + seed // 160 % 160, 40 + seed // 25600 % 160)
        image = picture((width, height), colour, seed).convert(mode)
        items.append(Item(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), said))
    return items


# -- any set ----------------------------------------------------------------------------------------------------------


def other_order(definition: SetDefinition) -> list[int]:
    """A list of labels in another order than the definition's; in its order if a name stands for two classes."""
    order = np.arange(definition.class_count)
    return (order if definition.name in AMBIGUOUS else np.random.default_rng(1).permutation(order)).tolist()


def _webdataset(d: SetDefinition, folder: Path, items: Items) -> None:
    """As CLIP_benchmark's webdataset_builder writes it: the classes have an order of their own."""
    order = other_order(d)
    place = {label: i for i, label in enumerate(order)}
    if d.task != "classification":
        write_text(folder / "dataset_type.txt", [d.task])
    if d.task != "retrieval":
        write_text(folder / "classnames.txt", [class_names(d)[label] for label in order])
        write_text(folder / "zeroshot_classification_templates.txt", templates(d))
    for split, some in items.items():
        half = len(some) // 2
        for number, part in enumerate((some[:half], some[half:])):
            write_tar(folder / split / f"{number}.tar", members(d, part, "webp", place, number * half))
        write_text(folder / split / "nshards.txt", ["2"])


def _flat(d: SetDefinition, folder: Path, items: Items) -> None:
    """Nothing but tars beside each other: labels have the definition's order."""
    for split, some in items.items():
        write_tar(folder / f"{split}-00000.tar", members(d, some, "jpg"))


def members(
    d: SetDefinition, items: list[Item], extension: str, place: dict[int, int] | None = None, first: int = 0
) -> dict[str, bytes]:
    """Members of a tar: images, and what is said of each."""
    place = place or {label: label for label in range(d.class_count)}
    found: dict[str, bytes] = {}
    for number, item in enumerate(items, first):
        found[f"s{number:07d}.{extension}"] = item.data
        if d.task == "retrieval":
            found[f"s{number:07d}.txt"] = "\n".join(item.said).encode()
        elif d.task == "multilabel":
            many, sink = np.zeros(d.class_count, np.float32), io.BytesIO()
            many[[place[label] for label in item.said]] = 1
            np.save(sink, many)
            found[f"s{number:07d}.npy"] = sink.getvalue()
        else:
            found[f"s{number:07d}.cls"] = str(place[item.said]).encode()
    return found


def _parquet(d: SetDefinition, folder: Path, items: Items) -> None:
    """As Hugging Face's datasets writes it: names of the classes, in another order, in the metadata of the schema."""
    order = other_order(d)
    place = {label: i for i, label in enumerate(order)}
    names = [class_folders(d)[label] for label in order] if d.task != "retrieval" else []
    column = "sentences" if d.task == "retrieval" else "label"
    kinds = {
        "retrieval": (pa.list_(pa.string()), {"feature": {"_type": "Value", "dtype": "string"}, "_type": "Sequence"}),
        "multilabel": (pa.list_(pa.int64()), {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}),
        "classification": (pa.int64(), {"names": names, "_type": "ClassLabel"}),
    }
    type_, feature = kinds[d.task]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    said = json.dumps({"info": {"features": {"image": {"_type": "Image"}, column: feature}}})
    schema = pa.schema({"image": image, column: type_}, metadata={"huggingface": said})
    for split, some in items.items():
        rows = [
            {"image": {"bytes": i.data, "path": f"{n:03d}.jpg"}, column: _renamed(i.said, place)}
            for n, i in enumerate(some)
        ]
        for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            path = folder / "data" / f"{split}-{number:05d}-of-00002.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=4)


def _renamed(said: Any, place: dict[int, int]) -> Any:
    return [place.get(one, one) for one in said] if isinstance(said, tuple) else place.get(said, said)


def _parquet_numbers(d: SetDefinition, folder: Path, items: Items) -> None:
    """Numbers alone, in the definition's order."""
    for split, some in items.items():
        rows = [{"id": f"{n:03d}", "image": item.data, "cls": _renamed(item.said, {})} for n, item in enumerate(some)]
        write_parquet(folder / f"{split}-00000.parquet", rows)


def _parquet_names(d: SetDefinition, folder: Path, items: Items) -> None:
    """A name for each image, or one caption."""
    for split, some in items.items():
        rows = [{"image": i.data, "text" if d.task == "retrieval" else "label": _name(d, i)} for i in some]
        write_parquet(folder / split / "0.parquet", rows)


def _name(d: SetDefinition, item: Item) -> str:
    return str(item.said[0] if d.task == "retrieval" else class_folders(d)[item.said])


def _folders(d: SetDefinition, folder: Path, items: Items) -> None:
    """A folder of every class, whether it has images or not. ImageNet's test images are in val, and ObjectNet has
    classes that are not scored; ImageNetV2's folders are numbers."""
    numbers = [str(label) for label in range(d.class_count)]
    names = numbers if d.name == "imagenetv2" else [name.replace("/", "-") for name in class_folders(d)]
    for split, some in items.items():
        place = folder / ("val" if (d.name, split) == ("imagenet1k", "test") else split)
        for name in (*names, *(["zipper_pull"] if d.name == "objectnet" else [])):
            (place / name).mkdir(parents=True)
        for number, item in enumerate(some):
            (place / names[item.said] / f"{number:03d}.jpeg").write_bytes(item.data)
    if d.name == "objectnet":
        (folder / "test" / "zipper_pull" / "0.jpg").write_bytes(encoded(picture(), "JPEG"))


_WRITERS: dict[str, Callable[[SetDefinition, Path, Items], None]] = {
    "webdataset": _webdataset,
    "flat": _flat,
    "parquet": _parquet,
    "parquet-numbers": _parquet_numbers,
    "parquet-names": _parquet_names,
    "folders": _folders,
}
