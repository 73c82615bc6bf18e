"""One split of a labelled set: its images, and their labels or captions.

Shapes: N images, C classes, B images of a batch, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import Status
from cache_schemas.plan import SourceFile
from dimefm.errors import RUN_AGAIN, SourceError, UnreadableError
from dimefm.images.decode import DecodeError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import ImageSample, file_key
from dimefm.sources.prompts import prompt
from dimefm.sources.read_image import read_image
from dimefm.system.wording import counted

if TYPE_CHECKING:  # the lists of sets are read without it
    import torch


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A split whose labels were all checked when it was opened. Images are read when they are asked for.

    `labels` are int64 (N,), or bool (N, C) where an image may have several. A retrieval set has `captions`, one or more
    per image, and neither labels nor class names. `where` is the folder, `layout` how the set is kept in it. `partial`
    says what differs from the published set, `notes` what else was found.
    """

    name: str
    split: str
    where: str
    layout: str
    samples: list[ImageSample]
    files: list[SourceFile]
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    labels: np.ndarray[Any, Any] | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    partial: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def class_labels(self) -> np.ndarray[Any, Any]:
        """`labels`, for a set that must have them."""
        assert self.labels is not None, f"{self.name} has captions, not labels"
        return self.labels

    def prompts(self) -> list[list[str]]:
        """For each class, its name in every template."""
        return [[prompt(template, name) for template in self.templates] for name in self.classnames]

    def digest(self) -> str:
        """sha256 over keys, sizes and labels or captions. It does not depend on where the files are."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.key}\0{sample.size}\0".encode())
        if self.captions is None:
            digest.update(np.ascontiguousarray(self.class_labels).data)
        else:
            digest.update(json.dumps(self.captions).encode())
        return digest.hexdigest()

    def batches(
        self, preprocess: Callable[[bytes], torch.Tensor], batch_size: int, threads: int = 2
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Preprocessed uint8 images (B, 3, H, W) and their places in `samples` (B,), the next batch read ahead.

        Images that are broken, or were missing when the set was opened, are left out. Raises UnreadableError for an
        image that has gone missing since.
        """
        import torch

        places, load = iter(range(len(self.samples))), _Loader(self.samples, preprocess)
        with ThreadPoolExecutor(threads) as pool:
            ahead = pool.map(load, list(islice(places, batch_size)))
            while loaded := list(ahead):
                ahead = pool.map(load, list(islice(places, batch_size)))
                good = [(place, image) for place, image in loaded if not isinstance(image, DecodeError)]
                if good:
                    yield torch.stack([image for _, image in good]), torch.tensor([place for place, _ in good])

    def require_readable(self, preprocess: Callable[[bytes], torch.Tensor]) -> None:
        """Return at the first image that can be read. Raises SourceError if there is none, UnreadableError as `batches`
        does."""
        load, reasons = _Loader(self.samples, preprocess), Counter[str]()
        for place in range(len(self.samples)):
            _, image = load(place)
            if not isinstance(image, DecodeError):
                return
            reasons[str(image)] += 1
        why = found_instead([f"{counted(count, 'image')}: {reason}" for reason, count in reasons.most_common()])
        what = f"{self.where}: none of the {len(self.samples):,} images can be read{why}"
        raise SourceError(what, remedy="mend them, or name another set")


@dataclass(frozen=True)
class _Loader:
    """Reads and preprocesses the image at a place in `samples`; an error where it cannot be read or decoded."""

    samples: list[ImageSample]
    preprocess: Callable[[bytes], torch.Tensor]

    def __call__(self, place: int) -> tuple[int, torch.Tensor | DecodeError]:
        sample = self.samples[place]
        data = read_image(sample)
        if isinstance(data, DecodeError):
            if sample.size > 0 and data.status in (Status.MISSING, Status.TRUNCATED):
                remedy = f"put the set back as it was, and {RUN_AGAIN}"
                raise UnreadableError(f"{sample.file} has changed since the set was opened: {data}", remedy=remedy)
            return place, data
        try:
            return place, self.preprocess(data)
        except DecodeError as error:
            return place, error


@dataclass(kw_only=True)
class Records:
    """What the reader of a layout found in a set's folder, before it is compared with a definition.

    `labels` are numbers that count `names`, which are class names or names of class folders. Without `names` they count
    `classnames`, which are read from the folder, as `templates` are. Without either they count the classes of the
    definition. `account` has what is not used.
    """

    where: str
    layout: str
    samples: list[ImageSample]
    files: list[SourceFile]
    labels: list[int] | list[list[int]] | None = None
    captions: list[list[str]] | None = None
    names: list[str] | None = None
    classnames: list[str] | None = None
    templates: list[str] | None = None
    account: Account = field(default_factory=Account)

    def require(self) -> None:
        """Raises SourceError if there is no image, if every image is missing, or if one has no caption."""
        if self.samples and all(sample.size < 0 for sample in self.samples):
            what = f"{self.where}: not one of the {len(self.samples):,} images is there, such as {self.samples[0].file}"
            raise SourceError(what, remedy="put them where the set has them, or mount the disk that holds them")
        if not self.samples:
            what = f"{self.where} holds no labelled image{found_instead(self.account.lines())}"
            raise SourceError(what, remedy="give tars of key.jpg and key.cls, or a folder of images for each class")
        bare = [s.key for s, texts in zip(self.samples, self.captions or [], strict=False) if not texts]
        if bare:
            what = f"{self.where}: {len(bare):,} images have no caption, such as {bare[0]}"
            raise SourceError(what, remedy="write captions into KEY.txt, one per line, or leave the image out")


def parse_label(data: bytes, where: str) -> int:
    """The integer in a .cls file. Raises SourceError if it holds anything else."""
    try:
        return int(data)
    except ValueError:
        raise SourceError(f"{where} holds {data[:20]!r}", remedy="write one integer, the label") from None


def labels_of(row: Any) -> list[Any]:
    """The labels of one image, which are a list if it may have several."""
    return row if isinstance(row, list) else [row]


def relabel(labels: Sequence[Any], new: Mapping[Any, int] | Sequence[int]) -> list[Any]:
    """The labels of images, each label replaced by `new[label]`."""
    return [[new[one] for one in row] if isinstance(row, list) else new[row] for row in labels]


def label_array(records: Records, classes: int, multilabel: bool) -> np.ndarray[Any, Any]:
    """The labels of `records` as int64 (N,), or bool (N, classes). Raises SourceError for a label without a class."""
    labels: list[Any] = records.labels or []
    for sample, row in zip(records.samples, labels, strict=True):
        for label in labels_of(row):
            if not 0 <= label < classes:
                what = f"{sample.file}: {sample.key} has label {label}, but there are {classes} classes"
                raise SourceError(what, remedy="labels count from 0 in the order of the class names")
    if not multilabel:
        return np.array(labels, np.int64)
    labels_NC = np.zeros((len(labels), classes), bool)
    for place, row in enumerate(labels):
        labels_NC[place, np.array(row, np.int64)] = True
    return labels_NC


def local_image(path: str, root: str) -> ImageSample:
    """The sample of a local image file below `root`. A missing file has size -1: reading it says that it is gone."""
    key = file_key(path, root)
    try:
        return ImageSample(key, path, 0, Path(path).stat().st_size)
    except FileNotFoundError:
        return ImageSample(key, path, 0, -1)
