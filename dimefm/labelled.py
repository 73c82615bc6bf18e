"""Labelled image sets: WebDataset tars of key.jpg and key.cls, or one folder a class; with class names and templates.

    SET/classnames.txt   one class a line, in the order of the labels
    SET/templates.txt    one prompt a line, {c} where the class name goes
    SET/*.tar            or SET/<class name>/*.jpg

Shapes: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dimefm import storage
from dimefm.decode import DecodeError
from dimefm.errors import SourceError
from dimefm.sources.images import IMAGE_EXTENSIONS, ImageFolder, split_key
from dimefm.sources.tar import tar_members
from dimefm.sources.texts import prompt, read_classnames, read_templates


@dataclass(frozen=True)
class Labelled:
    """One image of a set: where its bytes are, and its label."""

    file: str
    offset: int
    size: int
    label: int


class LabelledSet:
    """A set on disk. Everything is checked when it is opened; images are read as they are asked for."""

    def __init__(self, root: str) -> None:
        """Raises SourceError for a missing file, an image without a label, or a label without a class."""
        self.root = storage.absolute(root)
        self.name = self.root.rstrip("/").rpartition("/")[2]
        self.classnames = read_classnames(self.root)
        self.templates = read_templates(self.root)
        tars = [storage.join(self.root, n) for n in storage.listing(self.root) if n.endswith(".tar")]
        self.items = list(_from_tars(tars)) if tars else list(_from_folders(self.root, self.classnames))
        if not self.items:
            remedy = "give tars of key.jpg and key.cls, or a folder of images for each class"
            raise SourceError(f"{root} holds no labelled image", remedy=remedy)
        for item in self.items:
            if not 0 <= item.label < len(self.classnames):
                what = f"{item.file}: label {item.label}, but classnames.txt has {len(self.classnames)} classes"
                raise SourceError(what, remedy="labels count from 0 in the order of classnames.txt")

    def prompts(self) -> list[list[str]]:
        """By class, its prompts under every template."""
        return [[prompt(template, name) for template in self.templates] for name in self.classnames]

    def batches(
        self, preprocess: Callable[[bytes], torch.Tensor], batch_size: int, threads: int = 2
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Preprocessed uint8 images (B, 3, H, W) and their places in `items` (B,); unreadable ones are left out."""
        places, load = iter(range(len(self.items))), _Loader(self.items, preprocess)
        with ThreadPoolExecutor(threads) as pool:
            following = pool.map(load, list(islice(places, batch_size)))
            while loaded := list(following):
                following = pool.map(load, list(islice(places, batch_size)))
                good = [(place, image) for place, image in loaded if image is not None]
                if good:
                    yield torch.stack([image for _, image in good]), torch.tensor([place for place, _ in good])


def open_sets(paths: tuple[str, ...]) -> list[LabelledSet]:
    """The sets at these paths. Raises SourceError where two folders have the same name: results go by name."""
    sets = [LabelledSet(path) for path in paths]
    names = [labelled.name for labelled in sets]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two sets are called {name!r}", remedy="give folders with different names")
    return sets


@dataclass(frozen=True)
class _Loader:
    items: list[Labelled]
    preprocess: Callable[[bytes], torch.Tensor]

    def __call__(self, place: int) -> tuple[int, torch.Tensor | None]:
        item = self.items[place]
        try:
            return place, self.preprocess(storage.read_bytes(item.file, item.offset, item.size))
        except (OSError, DecodeError):
            return place, None


def _from_tars(tars: list[str]) -> Iterator[Labelled]:
    for tar in tars:
        problems: list[str] = []
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        for member in tar_members(tar, problems.append):
            key, extension = split_key(member.name)
            if extension in IMAGE_EXTENSIONS:
                images[key] = (member.offset, member.size)
            elif extension == "cls":
                labels[key] = _label(tar, key, storage.read_bytes(tar, member.offset, member.size))
        if problems:
            raise SourceError(problems[0], remedy="fetch the tar again")
        for key, (offset, size) in images.items():
            if key not in labels:
                raise SourceError(f"{tar}: {key} has no .cls", remedy="write its label, an integer, into KEY.cls")
            yield Labelled(tar, offset, size, labels[key])


def _label(tar: str, key: str, data: bytes) -> int:
    try:
        return int(data)
    except ValueError:
        raise SourceError(f"{tar}: {key}.cls holds {data[:20]!r}", remedy="write one integer, the label") from None


def _from_folders(root: str, classnames: list[str]) -> Iterator[Labelled]:
    if storage.is_url(root):
        raise SourceError(f"{root} holds no .tar", remedy="class folders must be local; pack them into tars")
    folders = sorted(p.name for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in folders:
        if name not in classnames:
            remedy = "name each folder as its line in classnames.txt"
            raise SourceError(f"{root}/{name} is not a class of classnames.txt", remedy=remedy)
        for file in ImageFolder(storage.join(root, name)).files():
            yield Labelled(file.path, 0, file.size, classnames.index(name))
