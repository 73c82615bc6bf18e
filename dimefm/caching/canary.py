"""Encode finished rows of a store again: whether its files, the libraries and the device still give what is stored.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cache_schemas import Status
from cache_schemas.embedding_store import EMBEDDING
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.image_loader import NOTHING_KNOWN, Known
from dimefm.caching.images_of import images_of, other_images
from dimefm.errors import RUN_AGAIN, MismatchError, UnreadableError
from dimefm.models.clip import Clip
from dimefm.store.added_views import is_addition, store_before
from dimefm.store.embedding_store import Store

_CANARY_ROWS, _CANARY_COSINE = 8, 0.999


def check_canary(store: Store, clip: Clip, *, accept_missing: bool = False) -> None:
    """Encode a few rows of a finished shard again, before more shards are encoded. Raises MismatchError where they no
    longer agree: the files, the libraries or the device have changed since, and new rows would not fit the old ones.
    Raises UnreadableError for a row that can no longer be read, unless `accept_missing`."""
    commit = next((c for c in store.commits() if c.counts.get(Status.OK.name)), None)
    if commit is None:
        if is_addition(store.schema):  # its first shard: the views before must be as they were
            check_canary(store_before(store), clip, accept_missing=accept_missing)
        return
    good = np.flatnonzero(store.status(commit.start, commit.stop) == Status.OK)[:_CANARY_ROWS] + commit.start
    for row, key, cosine in compare_again(store, clip, good, accept_missing=accept_missing):
        if np.isnan(cosine):
            if accept_missing:
                continue
            what = f"{store.path}: row {row} ({key}) was read when it was cached, and cannot be read now"
            raise UnreadableError(what, remedy=f"put its file back, or mount what it is on, and {RUN_AGAIN}")
        if not cosine >= _CANARY_COSINE:
            what = f"{store.path}: row {row} ({key}) encoded again has cosine {cosine:.4f} to what is stored"
            remedy = "a file, a library or the device has changed since it was written; cache into a new --out"
            raise MismatchError(what, remedy=remedy)


def compare_again(
    store: Store, clip: Clip, rows_N: np.ndarray[Any, Any], *, accept_missing: bool = True
) -> list[tuple[int, str, float]]:
    """Encode rows again, given in ascending order: for each its number, its key, and the least cosine to what is stored
    of its views, which are made from their numbers; NaN where it can no longer be read. Without `accept_missing`, a
    file that may not be read is an UnreadableError."""
    rows, known = images_of(store, rows_N), NOTHING_KNOWN
    if store.schema.views:
        views = dict(zip(rows_N.tolist(), store.views(rows_N), strict=True))
        known = Known(image=other_images(store), views=views.__getitem__)
    data = encode_rows(rows, store.schema, clip, accept_missing=accept_missing, known=known)
    again = data.arrays[EMBEDDING].astype(np.float32)
    kept = store.embeddings(rows_N).astype(np.float32)
    norms = np.linalg.norm(again, axis=-1) * np.linalg.norm(kept, axis=-1)
    cosine_N = ((again * kept).sum(axis=-1) / np.where(norms > 0, norms, 1)).reshape(len(rows_N), -1).min(axis=1)
    cosine_N[data.failed()] = np.nan
    return [(row.row, row.key, float(cosine)) for row, cosine in zip(rows, cosine_N, strict=True)]
