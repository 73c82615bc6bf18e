"""Which image of a source a name means: the one whose path ends in the same parts, the more of them the better.

What is compared are hashes of 8 bytes of the last 1, 2, ... parts of every name, in temporary files, a sixteenth of one
at a time. In memory are 24 bytes for each image and 17 for each name, and for a moment as much again, so that tens of
millions fit; on disk, 16 for each length of each name. Shapes: N names asked for, M images, K entries of a file.
"""

from __future__ import annotations

import errno
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dimefm.caching.repeats import as_array, repeats
from dimefm.errors import StoreError
from dimefm.sources.base import ImageSample
from dimefm.sources.image_kinds import IMAGE_EXTENSIONS
from dimefm.sources.read_image import ImagePlace

Array = np.ndarray[Any, Any]
Entries = tuple[Array, Array]
"""Hashes of names and whose they are, each int64 (K,)."""
Level = tuple[int, bool]
"""How many parts are equal, and whether the extension of an image is one of what is equal."""

Form = tuple[Level, int]
"""A level, and the hash of what a name has at it."""

WHOLE = 100  # parts: all of the name, and all of an image's key or path
_NONE, _SEVERAL = -1, -2
_MOST = 16  # parts that are told apart
_FILE_PARTS, _PENDING = 16, 65536


@dataclass(frozen=True)
class Matches:
    """The image of each name, int64 (N,), negative where it has none or it is not known which; and how many last parts
    of both are equal, uint8 (N,): WHOLE for all, 0 without an image. `repeated` names came before."""

    image_N: Array
    parts_N: Array
    images: Images
    first: tuple[str, str]
    repeated: int

    def place(self, row: int) -> ImagePlace:
        """Where the image of a name is; `file` is empty where it has none."""
        return self.images.place(int(self.image_N[row]))

    def ambiguous(self) -> Array:
        """The names whose longest match is with several images, or that several names have, int64 (n,)."""
        return np.flatnonzero(self.image_N == _SEVERAL)

    def spare(self) -> Array:
        """The images that no name has, int64 (m,)."""
        spare_M = np.ones(len(self.images), bool)
        spare_M[self.image_N[self.image_N >= 0]] = False
        return np.flatnonzero(spare_M)

    def kinds(self) -> list[tuple[int, str, int]]:
        """Equal parts, what that is called, and how many names were matched so; the strongest first."""
        counts = np.bincount(self.parts_N, minlength=2)
        found = [parts for parts in np.flatnonzero(counts).tolist() if parts][::-1]
        return [(parts, kind(parts), int(counts[parts])) for parts in found]

    def sample(self, count: int) -> Array:
        """At most `count` names with an image, of the weakest kind of match first, and spread over each kind."""
        chosen: list[Array] = []
        for parts, _, _ in reversed(self.kinds()):
            chosen.append(spread(np.flatnonzero(self.parts_N == parts), count - sum(map(len, chosen))))
        return np.concatenate([np.empty(0, np.int64), *chosen])


def kind(parts: int) -> str:
    """What so many equal parts are called."""
    return {WHOLE: "the whole key or path", 1: "the last part alone"}.get(parts, f"the last {parts} parts")


def spread(rows_N: Array, count: int) -> Array:
    """At most `count` of these, evenly spread."""
    return rows_N[np.linspace(0, len(rows_N) - 1, min(count, len(rows_N))).astype(np.int64)]


class Images:
    """Where the images of a source are."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._file, self._offset, self._size = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._file)

    def add(self, sample: ImageSample) -> None:
        """One more. Those of a file come together."""
        if not self._files or self._files[-1] != sample.file:
            self._files.append(sample.file)
        self._file.append(len(self._files) - 1)
        self._offset.append(sample.offset)
        self._size.append(sample.size)

    def place(self, image: int) -> ImagePlace:
        """Where an image is; `file` is empty where its number is negative."""
        if image < 0:
            return ImagePlace("", 0, 0)
        return ImagePlace(self._files[self._file[image]], self._offset[image], self._size[image])


def match(names: Iterable[str], samples: Iterable[ImageSample], *, least: int = 1) -> Matches:
    """The image of each name, by its key or the path of its own file: the whole of it, else the most last parts that a
    name and any image have in common, `least` or more; with the extension of an image or without.

    A name has no image where its longest match is with several images, where several names match one as well, or where
    another matches it better. Raises StoreError where the temporary files cannot be written.
    """
    images, hashes, first = Images(), array("q"), ["", ""]
    with TemporaryDirectory(prefix="dimefm-match-") as folder:
        theirs = _Suffixes(f"{folder}/images")
        for place, sample in enumerate(samples):
            first[1] = first[1] or sample.key
            images.add(sample)
            forms = _forms(sample.key, least)
            theirs.add(place, {*forms, *_forms(sample.file, least)} if _is_image(sample.file) else forms)
        ours, levels = _Suffixes(f"{folder}/names"), theirs.levels()
        most = max((count for count, _ in levels if count != WHOLE), default=0)
        extensions = any(extension for _, extension in levels)
        for row, name in enumerate(names):
            first[0] = first[0] or name
            hashes.append(hash(name))
            if images:
                forms = _forms(name, least, most, extensions)
                if "\\" in name:  # a path of Windows
                    forms = list({*forms, *_forms(name.replace("\\", "/"), least, most, extensions)})
                ours.add(row, forms)
        image_N, level_N = np.full(len(hashes), _NONE, np.int64), np.zeros(len(hashes), np.uint8)
        for level in sorted(ours.levels() & theirs.levels(), reverse=True):
            for part in range(_FILE_PARTS):
                _settle(ours.read(level, part), theirs.read(level, part), level, image_N, level_N)
    _one_name_each(image_N, level_N, len(images))
    level_N[image_N < 0] = 0
    repeated = sum(len(places) for places in repeats(as_array(hashes)))
    return Matches(image_N, level_N // 2, images, (first[0], first[1]), repeated)


def _settle(ours: Entries, theirs: Entries, level: Level, image_N: Array, level_N: Array) -> None:
    """The names that have no image yet and share a hash of this level with one image, or with several."""
    open_K = image_N[ours[1]] == _NONE
    (hash_K, row_K), (values, place_K) = (array[open_K] for array in ours), theirs
    if not len(hash_K) or not len(values):
        return
    values, first, count = np.unique(values, return_index=True, return_counts=True)
    at_K = np.minimum(np.searchsorted(values, hash_K), len(values) - 1)
    found_K = values[at_K] == hash_K
    at_K, row_K = at_K[found_K], row_K[found_K]
    image_N[row_K] = np.where(count[at_K] == 1, place_K[first[at_K]], _SEVERAL)
    level_N[row_K] = 2 * level[0] + level[1]


def _one_name_each(image_N: Array, level_N: Array, images: int) -> None:
    """Leave an image to the name that matches it best, or to none of several that match it as well."""
    row_K = np.flatnonzero(image_N >= 0)
    image_K, level_K = image_N[row_K], level_N[row_K]
    best_M = np.zeros(images, np.uint8)
    np.maximum.at(best_M, image_K, level_K)
    best_K = level_K == best_M[image_K]
    claims_M = np.bincount(image_K[best_K], minlength=images)
    image_N[row_K[~best_K]] = _NONE
    image_N[row_K[best_K & (claims_M[image_K] > 1)]] = _SEVERAL


class _Suffixes:
    """Hashes of the last parts of names and whose they are, int64 (K, 2), a file for each level."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir()
        self._pending: defaultdict[Level, array[int]] = defaultdict(lambda: array("q"))

    def add(self, place: int, forms: Iterable[Form]) -> None:
        """Those of one image, or row."""
        for level, value in forms:
            pending = self._pending[level]
            pending.append(value)
            pending.append(place)
            if len(pending) >= _PENDING:
                self._write(level)

    def levels(self) -> set[Level]:
        """Those that there are."""
        return set(self._pending)

    def read(self, level: Level, part: int) -> Entries:
        """Hashes and places of one of the parts of a level."""
        if self._pending[level]:
            self._write(level)
        table_K2 = np.memmap(self._path(level), np.int64, mode="r").reshape(-1, 2)
        mine_K = table_K2.view(np.uint8)[:, 0] % _FILE_PARTS == part  # a byte of the hash
        return np.asarray(table_K2[mine_K, 0]), np.asarray(table_K2[mine_K, 1])

    def _write(self, level: Level) -> None:
        try:
            with self._path(level).open("ab") as file:
                self._pending[level].tofile(file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "set TMPDIR to a folder with room for 16 bytes for each part of each key and path"
            raise StoreError(f"{self._folder} cannot be written: {error.strerror}", remedy=remedy) from error
        del self._pending[level][:]

    def _path(self, level: Level) -> Path:
        return self._folder / f"{level[0]}-{level[1]:d}"


def _forms(name: str, least: int, most: int = _MOST, extensions: bool = True) -> list[Form]:
    """The hashes that a name is found by: of its last parts, `least` to `most`, and of its whole; without the extension
    of an image and, where it has one and `extensions` matter, with it."""
    parts = [part for part in name.split("/") if part not in ("", ".")] or [name]
    bare = stem(parts[-1])
    found = []
    for last in {bare, parts[-1]} if extensions else (bare,):
        text, extension = last, last != bare
        for count in range(1, min(len(parts), most) + 1):
            text = f"{parts[-count]}/{text}" if count > 1 else text
            if count >= least:
                found.append(((count, extension), hash(text)))
        found.append(((WHOLE, extension), hash("/".join([*parts[:-1], last]))))
    return found


def stem(name: str) -> str:
    """The last part of a path, without the extension of an image."""
    last = name.rpartition("/")[2]
    base, _, extension = last.rpartition(".")
    return base if base and extension.lower() in IMAGE_EXTENSIONS else last


def _is_image(path: str) -> bool:
    """Whether a file is an image of its own, not an archive of many."""
    return stem(path) != path.rpartition("/")[2]
