"""The pairs of a test image and a training image that `leaks` looks at: near by embedding, then compared by pixels.

Shapes: N test images, K training images near to each, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas.leaks import LEAKED, LookedFor
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import DimefmError
from dimefm.images.decode import DecodeError
from dimefm.leaks.alike import Look, similarity
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store
from dimefm.system.machine import cpus
from dimefm.system.progress import Progress

_LOOKS, _TESTED, _BLOCK = 512, 32, 4096  # looks, of 0.5 MB, that are kept: of training and of test images; pairs
_Array = np.ndarray[Any, Any]


def image_pairs(title: str, images: Store, test: ImageSet, search: Any, features: Any, asked: LookedFor) -> pa.Table:
    """The pairs of the set `title`, LEAKED. `search` is over the store, `features` are those of the test images."""
    pairs = _candidates(search, features.all(), features.readable, asked)
    return _table(title, images, test, pairs, list(_similarities(images, test, pairs)), asked.similarity)


def _candidates(search: Any, feature_ND: _Array, readable_N: _Array, asked: LookedFor) -> list[tuple[int, int, float]]:
    """Test row, training row and cosine of each pair that is to be looked at."""
    rows_N = np.flatnonzero(readable_N)
    score_NK, row_NK = search.search(feature_ND[rows_N], asked.nearest)
    near_NK = (row_NK >= 0) & (score_NK >= asked.cosine)
    places, ranks = np.nonzero(near_NK)
    found = zip(rows_N[places].tolist(), row_NK[places, ranks].tolist(), score_NK[places, ranks].tolist(), strict=True)
    return list(found)


def _similarities(images: Store, test: ImageSet, pairs: list[tuple[int, int, float]]) -> Iterator[float | None]:
    """The similarity of the pixels of each pair; None where one of the two cannot be read."""
    rows = np.unique(np.array([row for _, row, _ in pairs], np.int64))
    places = dict(zip(rows.tolist(), _places(images, rows), strict=True))

    @lru_cache(_LOOKS)
    def trained(row: int) -> Look | None:
        return _look(places[row])

    @lru_cache(_TESTED)
    def tested(row: int) -> Look | None:
        sample = test.samples[row]
        return _look(ImagePlace(sample.file, sample.offset, sample.size))

    def compare(pair: tuple[int, int, float]) -> float | None:
        one, other = tested(pair[0]), trained(pair[1])
        return None if one is None or other is None else similarity(one, other)

    with ThreadPoolExecutor(cpus()) as pool, Progress(f"comparing {test.name}", len(pairs), "pair") as progress:
        for at in range(0, len(pairs), _BLOCK):
            for done, value in enumerate(pool.map(compare, pairs[at : at + _BLOCK]), at + 1):
                progress.at(done)
                yield value


def _places(images: Store, rows_N: _Array) -> list[ImagePlace]:
    if images.schema.pixels:
        return [ImagePlace(*place) for place in images.pixel_places(rows_N)]
    fields = ImagePlace._fields
    return [ImagePlace(**{name: one[name] for name in fields}) for one in images.samples(rows_N, fields)]


def _look(place: ImagePlace) -> Look | None:
    try:
        return Look(read_encoded(place)) if place.file else None
    except (DimefmError, DecodeError, OSError):
        return None


def _table(
    title: str, images: Store, test: ImageSet, pairs: list[tuple[int, int, float]], values: list[float | None],
    least: float,
) -> pa.Table:  # fmt: skip
    rows = np.array([row for _, row, _ in pairs], np.int64)
    keys = [one["key"] for one in images.samples(rows, ("key",))]
    columns = {
        "set": [title] * len(pairs),
        "test_row": [test_row for test_row, _, _ in pairs],
        "test_key": [test.samples[test_row].key for test_row, _, _ in pairs],
        "row": rows,
        "key": keys,
        "cosine": [cosine for _, _, cosine in pairs],
        "similarity": values,
        "leak": [value is not None and value >= least for value in values],
    }
    return pa.table(columns, schema=LEAKED)
