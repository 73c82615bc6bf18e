"""Find the image of a source that a name means: the one whose path ends in the same parts, as many as possible.

It compares 8-byte hashes of the last 1, 2, ... parts of every name. They are kept in temporary files and compared a
sixteenth of a file at a time. Memory holds 24 bytes per image and 17 per name, and for a moment twice that, so that
tens of millions fit; the disk holds 16 bytes per number of parts per name. Shapes: N names, M images, K entries of a
file.
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
"""Hashes of names, and the row or image that each belongs to, each int64 (K,)."""
Level = tuple[int, bool]
"""How many parts are equal, and whether the image's extension is equal too."""

Form = tuple[Level, int]
"""A level, and the hash of a name at that level."""

WHOLE = 100  # stands for all parts, of the name and of the image's key or path
_NONE, _SEVERAL = -1, -2
_MOST = 16  # parts that are compared
_FILE_PARTS, _PENDING = 16, 65536


@dataclass(frozen=True)
class Matches:
    """The image of each name, int64 (N,), negative where it has none or several; and how many of their last parts are
    equal, uint8 (N,): WHOLE for all, 0 without an image. `first` are the first name and the first key, for messages;
    `repeated` names are equal to an earlier one."""

    image_N: Array
    parts_N: Array
    images: Images
    first: tuple[str, str]
    repeated: int

    def place(self, row: int) -> ImagePlace:
        """Where the image of a name is; `file` is empty where it has none."""
        return self.images.place(int(self.image_N[row]))

    def ambiguous(self) -> Array:
        """The names whose longest match is several images, or an image that matches several names, int64 (n,)."""
        return np.flatnonzero(self.image_N == _SEVERAL)

    def spare(self) -> Array:
        """The images that no name means, int64 (m,)."""
        spare_M = np.ones(len(self.images), bool)
        spare_M[self.image_N[self.image_N >= 0]] = False
        return np.flatnonzero(spare_M)

    def kinds(self) -> list[tuple[int, str, int]]:
        """For each number of equal parts: the number, its description, the names that matched so; strongest first."""
        counts = np.bincount(self.parts_N, minlength=2)
        found = [parts for parts in np.flatnonzero(counts).tolist() if parts][::-1]
        return [(parts, kind(parts), int(counts[parts])) for parts in found]

    def sample(self, count: int) -> Array:
        """At most `count` names with an image, those with the weakest match first, spread over each kind of match."""
        chosen: list[Array] = []
        for parts, _, _ in reversed(self.kinds()):
            chosen.append(spread(np.flatnonzero(self.parts_N == parts), count - sum(map(len, chosen))))
        return np.concatenate([np.empty(0, np.int64), *chosen])


def kind(parts: int) -> str:
    """The description of a match by this number of equal parts."""
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
        """Add an image. The images of a file must be added one after the other."""
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
    """Find the image of each name, by the image's key or the path of its own file: the image that is equal as a whole,
    or else has the most last parts in common with the name, at least `least`; with or without the image's extension.

    A name gets no image where its longest match is several images, or an image that another name matches as well or
    better. Raises StoreError where the temporary files cannot be written.
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
    """Give an image to each name that has none yet and shares a hash of this level with one image; mark a name that
    shares it with several."""
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
    """Leave each image to the name that matches it best, or to none if several match it equally well."""
    row_K = np.flatnonzero(image_N >= 0)
    image_K, level_K = image_N[row_K], level_N[row_K]
    best_M = np.zeros(images, np.uint8)
    np.maximum.at(best_M, image_K, level_K)
    best_K = level_K == best_M[image_K]
    claims_M = np.bincount(image_K[best_K], minlength=images)
    image_N[row_K[~best_K]] = _NONE
    image_N[row_K[best_K & (claims_M[image_K] > 1)]] = _SEVERAL


class _Suffixes:
    """Hashes of the last parts of names, each with its row or image, int64 (K, 2), in a file per level."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir()
        self._pending: defaultdict[Level, array[int]] = defaultdict(lambda: array("q"))

    def add(self, place: int, forms: Iterable[Form]) -> None:
        """Add the forms of one image, or of one row's name."""
        for level, value in forms:
            pending = self._pending[level]
            pending.append(value)
            pending.append(place)
            if len(pending) >= _PENDING:
                self._write(level)

    def levels(self) -> set[Level]:
        """The levels at which there are hashes."""
        return set(self._pending)

    def read(self, level: Level, part: int) -> Entries:
        """The entries of one sixteenth of a level."""
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
    """The hashes by which a name is found: of its last `least` to `most` parts, and of the whole name; without the
    extension of an image, and also with it, if there is one and `extensions` matter."""
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
    """Whether a file is a single image, not an archive of many."""
    return stem(path) != path.rpartition("/")[2]
