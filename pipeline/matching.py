"""Which image of a source a name means: by hashes of 8 bytes, so that tens of millions fit into memory.

Shapes: N names asked for, M images of the source.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from dimefm.sources.base import ImageSample
from dimefm.sources.images import IMAGE_EXTENSIONS
from pipeline.repeats import as_array, repeats


class Names:
    """Hashes of names, and of their last parts without the extension of an image."""

    def __init__(self, names: Iterable[str]) -> None:
        self.first = ""
        self._whole, self._stem = array("q"), array("q")
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """One more."""
        self.first = self.first or name
        self._whole.append(hash(name))
        self._stem.append(hash(stem(name)))

    @property
    def whole_N(self) -> np.ndarray[Any, Any]:
        """int64 (N,)."""
        return as_array(self._whole)

    @property
    def stem_N(self) -> np.ndarray[Any, Any]:
        """int64 (N,)."""
        return as_array(self._stem)

    def repeated(self) -> int:
        """How many names occurred before."""
        return sum(len(places) for places in repeats(self.whole_N))


class Images:
    """The images of a source and where they are: about 50 bytes each, however long their names."""

    def __init__(self, samples: Iterable[ImageSample]) -> None:
        self.keys = Names(())
        self._files: dict[str, int] = {}
        self._paths, self._file, self._offset, self._size = array("q"), array("q"), array("q"), array("q")
        for sample in samples:
            self.keys.add(sample.key)
            self._paths.append(hash(sample.file))
            self._file.append(self._files.setdefault(sample.file, len(self._files)))
            self._offset.append(sample.offset)
            self._size.append(sample.size)
        self._names = list(self._files)

    def match(self, names: Names) -> np.ndarray[Any, Any]:
        """The image of each name, int64 (N,), -1 where there is none: by its key, else by the path of its file, else
        by the last part of its key. A name, or a key, that occurs twice means no image: it is not known which."""
        image_N = only_match(names.whole_N, self.keys.whole_N)
        for ours_N, theirs_M in (
            (names.whole_N, as_array(self._paths)),
            (names.stem_N, self.keys.stem_N),
        ):
            image_N = np.where(image_N < 0, only_match(ours_N, theirs_M), image_N)
        return image_N

    def place(self, image: int) -> tuple[str, int, int]:
        """File, offset and size of an image; no file where it is -1."""
        if image < 0:
            return "", 0, 0
        return self._names[self._file[image]], self._offset[image], self._size[image]


def stem(name: str) -> str:
    """The last part of a path, without the extension of an image."""
    last = name.rpartition("/")[2]
    base, _, extension = last.rpartition(".")
    return base if base and extension.lower() in IMAGE_EXTENSIONS else last


def only_match(ours_N: np.ndarray[Any, Any], theirs_M: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each of ours its place in theirs, int64 (N,); -1 where it is not there, or is twice on either side."""
    (ours, at_ours), (theirs, at_theirs) = _singles(ours_N), _singles(theirs_M)
    _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    place_N = np.full(len(ours_N), -1, np.int64)
    place_N[at_ours[i]] = at_theirs[j]
    return place_N


def _singles(values_N: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    values, places, counts = np.unique(values_N, return_index=True, return_counts=True)
    return values[counts == 1], places[counts == 1]
