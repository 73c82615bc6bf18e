"""Thumbnails for pages: pictures of rows of an image store, or of images at known places, as `data:` URIs, and how many
could not be had."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dimefm.caching.thumbnails import thumbnails, thumbnails_at
from dimefm.pages.page import Words
from dimefm.sources.read_image import EncodedImage
from dimefm.store.embedding_store import Store
from dimefm.system.wording import counted

SIDE = 112
"""Pixels of the longer side."""


def as_uri(jpeg: bytes) -> str:
    """A JPEG as an address that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


class _Counting:
    """Counts the pictures that were asked for, and those that could not be had."""

    def __init__(self) -> None:
        self._asked, self._missing = 0, Counter[str]()

    def _shown(self, found: Iterable[bytes | str]) -> list[str | None]:
        shown: list[str | None] = []
        for one in found:
            self._asked += 1
            if isinstance(one, str):
                self._missing[one] += 1
            shown.append(None if isinstance(one, str) else as_uri(one))
        return shown

    def notes(self) -> list[Words]:
        """A warning where pictures could not be had, with the first reason."""
        if not self._missing:
            return []
        (reason, _), *_ = self._missing.most_common(1)
        what = f"{self._missing.total():,} of {counted(self._asked, 'picture')} cannot be shown"
        return [Words(f"{what}, such as: {reason}", warning=True)]


class Pictures(_Counting):
    """The pictures of a store. What cannot be read is counted, and `notes` says so."""

    def __init__(self, store: Store, side: int = SIDE) -> None:
        super().__init__()
        self._store, self._side = store, side

    def of(self, rows_N: np.ndarray[Any, Any]) -> list[str | None]:
        """The pictures of some rows, None where there is none."""
        return self._shown(thumbnails(self._store, rows_N, self._side) if len(rows_N) else ())


class PicturesAt(_Counting):
    """As Pictures, of images whose places are known."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        self._side = side

    def of(self, places: Sequence[EncodedImage]) -> list[str | None]:
        """The pictures of some images, None where there is none."""
        return self._shown(thumbnails_at(places, self._side))
