"""Encode rows of a shard as its store asks for it: with a search for images that crash, with the images that views are
mixed with, and for views that are added to a store only where the views before them have an embedding.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypedDict, Unpack

import numpy as np

from cache_schemas import Status
from cache_schemas.embedding_store import STATUS
from cache_schemas.plan import PlannedImage
from dimefm.caching.crashing_images import without_crashes
from dimefm.caching.encode_rows import OnRows, Rows, ShardData, encode_rows
from dimefm.caching.image_loader import Known
from dimefm.caching.images_of import images_of, other_images
from dimefm.caching.permanent_failures import require_permanent
from dimefm.errors import StoreError
from dimefm.models.clip import Clip
from dimefm.store.added_views import is_addition, store_before
from dimefm.store.embedding_store import Store
from dimefm.store.pixel_tar import PixelTar
from dimefm.store.zarr_arrays import DAMAGED


class How(TypedDict, total=False):
    """How rows are encoded; the defaults are those of `encode_rows`.

    `threads` read and decode. `progress` is called with the number of further rows that are done. `turn` is held while
    the teacher works: with two shards on two threads, one reads and decodes its first rows, or writes its results,
    while the other has the teacher. `accept_missing`: leave out the images whose file is gone or may not be read.
    """

    threads: int
    progress: OnRows
    turn: AbstractContextManager[Any]
    accept_missing: bool


def encode_planned(
    store: Store, rows: Rows, clip: Clip, *, careful: bool, tar: PixelTar | None, **how: Unpack[How]
) -> ShardData:
    """Encode rows of one shard, as they were planned, in ascending order; `careful` as in encode_shard. Raises what
    `encode_rows` raises; for views that are added also UnreadableError as caching.permanent_failures does, and
    StoreError for a JPEG of the store that cannot be decoded any more."""
    if is_addition(store.schema) and rows:
        return _encode_added(store, rows, clip, careful=careful, **how)
    return _encode_images_or_texts(store, rows, (), clip, careful=careful, tar=tar, **how)


def _encode_images_or_texts(
    store: Store,
    rows: Rows,
    unreadable: Sequence[PlannedImage],
    clip: Clip,
    *,
    careful: bool,
    tar: PixelTar | None,
    **how: Unpack[How],
) -> ShardData:
    """`unreadable`: other images of the shard that are not to be read, to be mixed in."""
    if store.schema.kind == "text":
        return encode_rows(rows, store.schema, clip, **how)
    if careful:
        rows = without_crashes(rows, store.schema, clip.device, how.get("threads", 1))
    known = Known(image=other_images(store, [*rows, *unreadable]))
    return encode_rows(rows, store.schema, clip, tar=tar, known=known, **how)


def _encode_added(store: Store, rows: Rows, clip: Clip, *, careful: bool, **how: Unpack[How]) -> ShardData:
    """A row that has no embedding in the views before fails as it did there."""
    before, data = store_before(store), ShardData.empty(len(rows), store.schema)
    shard = rows[0].row // store.schema.shard_rows
    start, stop = store.schema.shard_range(shard)
    rows_N = np.array([row.row for row in rows])
    good = np.flatnonzero(before.status(start, stop)[rows_N - start] == Status.OK)
    failed = before.failures_in(shard)
    if len(good):
        images = images_of(store, rows_N[good])
        bad_N = np.array(sorted(row for row, one in failed.items() if one.status != Status.NOT_FINITE.name), np.int64)
        unreadable = [image._replace(crash=failed[image.row].reason) for image in images_of(store, bad_N)]
        found = _encode_images_or_texts(store, images, unreadable, clip, careful=careful, tar=None, **how)
        _require_as_before(store, before, images, found, accept_missing=how.get("accept_missing", False))
        data.replace(good, found)
    for place in np.setdiff1d(np.arange(len(rows)), good).tolist():
        failure = failed[rows[place].row]
        data.fail(place, Status[failure.status], failure.reason)
    return data


def _require_as_before(
    store: Store, before: Store, images: list[Any], found: ShardData, *, accept_missing: bool
) -> None:
    """Raises StoreError or UnreadableError for images that could be read for the views before, and cannot now."""
    status_N = found.arrays[STATUS]
    if not before.schema.pixels:
        require_permanent(store, images, status_N, found.reasons, accept_missing=accept_missing)
        return
    for place in found.failed().tolist():
        if status_N[place] != Status.NOT_FINITE:
            what = f"{images[place].file}, row {images[place].row} cannot be decoded: {found.reasons[place]}"
            raise StoreError(what, remedy=DAMAGED)
