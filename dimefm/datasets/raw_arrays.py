"""Sets that are published as raw arrays (CIFAR, MNIST, FER2013, PatchCamelyon): unpacked once, into a tar of PNGs.

Shapes: H height, W width.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_schemas import digest_of
from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_names
from dimefm.datasets.image_set import Records
from dimefm.datasets.webdataset_layout import read_webdataset
from dimefm.errors import SourceError
from dimefm.system import storage

_Pixels = Iterator[tuple[np.ndarray[Any, Any], int]]
"""Images, uint8 (H, W) or (H, W, 3), and their labels."""

# Limits, several times the published sizes: bytes of an IDX file, images of PatchCamelyon, values of one of those.
_MOST_IDX, _MOST_PATCHES, _MOST_VALUES = 1 << 28, 1 << 20, 1 << 20

_DAMAGED = (
    *(OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, csv.Error, zlib.error),
    MemoryError,  # for an array whose header claims petabytes
)
"""What reading arrays raises if they are cut short, or are other files."""


def read_raw(
    name: str, unpacked: str, folder: str, split: str, definition: SetDefinition | None = None
) -> Records | None:
    """The images of the arrays in `folder`, read from a tar below `unpacked`, which is written if it does not exist."""
    if storage.is_url(folder):
        return None
    places = (Path(folder, inner) for inner in ("", *_INNER[name]))
    files = next(filter(None, (_array_files(name, place, split) for place in places)), None)
    if files is None:
        return None
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = Path(unpacked, f"{name}-{split}-{digest_of(facts)[:12]}")
    if not (target / "test.tar").exists():
        with storage.writing_to(str(target)):
            _write_tar(target / "test.tar", _encoded(name, files, split))
    records = read_webdataset(str(target), "test", None)
    if records is not None:
        records.where = str(files[0].parent)
        records.names = class_names(definition) if definition is not None else None
    return records


def _encoded(name: str, files: list[Path], split: str) -> Iterator[tuple[bytes, int]]:
    """Each image as PNG, and its label. Raises SourceError for arrays that cannot be read."""
    try:
        for image, label in _READ[name](files, split):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            yield png.getvalue(), label
    except _DAMAGED as error:
        what = f"{files[0]} cannot be read: {type(error).__name__}: {error}"
        raise SourceError(what, remedy="fetch the set again") from error


def _write_tar(path: Path, images: Iterator[tuple[bytes, int]]) -> None:
    with storage.writing_atomically(str(path)) as sink, tarfile.open(fileobj=sink, mode="w") as tar:
        for place, (png, label) in enumerate(images):
            for name, data in ((f"{place:07d}.png", png), (f"{place:07d}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _array_files(name: str, place: Path, split: str) -> list[Path] | None:
    """The files of a split in this folder; None unless it has all of them."""
    for names in _FILES[name].get(split, ()):
        plain = [place / name for name in names]
        found = [path if path.is_file() else path.with_name(f"{path.name}.gz") for path in plain]
        if all(path.is_file() for path in found):
            return found
    return None


def _read_cifar(name: str, files: list[Path], split: str) -> _Pixels:
    """Read by torchvision, which compares each file's md5 with the published one before it unpickles it."""
    from torchvision import datasets

    folder = files[0].parent
    in_folder: Any = type(name, (getattr(datasets, name),), {"base_folder": folder.name})
    dataset = in_folder(str(folder.parent), train=split == "train", download=False)
    yield from zip(dataset.data, dataset.targets, strict=True)


def _read_mnist(files: list[Path], split: str) -> _Pixels:
    images, labels = map(_read_idx, files)
    yield from zip(images, labels.tolist(), strict=True)


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    """A file in the IDX format: two zero bytes, a type, the number of axes, their lengths, the values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(_MOST_IDX + 1)
    if data[:3] != b"\0\0\x08":
        raise ValueError("it is no IDX file of bytes")
    if len(data) > _MOST_IDX:
        raise ValueError(f"it has more than {_MOST_IDX:,} bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


def _read_fer2013(files: list[Path], split: str) -> _Pixels:
    """In the file sad is 4, surprise 5 and neutral 6; the definition has the classes in alphabetical order."""
    usage = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}[split]
    with files[0].open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            if row["Usage"].strip() == usage:
                yield np.array(row["pixels"].split(), np.uint8).reshape(48, 48), _FER2013[int(row["emotion"])]


_FER2013 = (0, 1, 2, 3, 5, 6, 4)


def _read_pcam(files: list[Path], split: str) -> _Pixels:
    import h5py

    with h5py.File(files[0]) as images, h5py.File(files[1]) as labels:
        rows, *shape = images["x"].shape
        if rows > _MOST_PATCHES or math.prod(shape) > _MOST_VALUES or len(labels["y"]) != rows:
            raise ValueError(f"it is {images['x'].shape} with {labels['y'].shape} labels, not patches of (96, 96, 3)")
        for start in range(0, rows, 256):
            block = images["x"][start : start + 256], labels["y"][start : start + 256].reshape(-1).tolist()
            yield from zip(*block, strict=True)


# By set and split: the groups of files that may hold the split, the first complete group is read;
_FILES: dict[str, dict[str, list[list[str]]]] = {
    "cifar10": {"train": [[f"data_batch_{i}" for i in range(1, 6)]], "test": [["test_batch"]]},
    "cifar100": {"train": [["train"]], "test": [["test"]]},
    "fer2013": {split: [["icml_face_data.csv"], ["fer2013.csv"]] for split in ("train", "val", "test")},
    "mnist": {
        split: [[f"{word}-images-idx3-ubyte", f"{word}-labels-idx1-ubyte"]]
        for split, word in (("train", "train"), ("test", "t10k"))
    },
    "patch_camelyon": {
        split: [[f"camelyonpatch_level_2_split_{word}_{array}.h5" for array in "xy"]]
        for split, word in (("train", "train"), ("val", "valid"), ("test", "test"))
    },
}
# the folders that may hold them, within the folder of the set;
_INNER = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "fer2013": ("fer2013",),
    "mnist": ("MNIST/raw", "raw"),
    "patch_camelyon": ("pcam",),
}
# and the function that reads them.
_READ: dict[str, Callable[[list[Path], str], _Pixels]] = {
    "cifar10": partial(_read_cifar, "CIFAR10"),
    "cifar100": partial(_read_cifar, "CIFAR100"),
    "fer2013": _read_fer2013,
    "mnist": _read_mnist,
    "patch_camelyon": _read_pcam,
}
RAW = frozenset(_READ)
"""The names of the sets that this module reads."""
