"""The work of one shard, as a plain function: its rows of the plan in, a committed shard out. Runs with or without Ray.

Shapes: N rows of the shard.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, Unpack

import numpy as np

from cache_schemas import Commit, Failure, Status
from cache_schemas.embedding_store import PIXEL_INDEX, STATUS, pixels_path
from cache_schemas.plan import planned_rows
from dimefm.caching.encode_planned import How, encode_planned
from dimefm.caching.encode_rows import Rows, ShardData
from dimefm.caching.permanent_failures import require_permanent
from dimefm.errors import StoreError
from dimefm.models.clip import Clip
from dimefm.store.added_views import is_addition
from dimefm.store.commit import remove_commit
from dimefm.store.embedding_store import Store
from dimefm.store.pixel_tar import PixelTar, pixel_tar
from dimefm.store.zarr_arrays import DAMAGED, digest_arrays
from dimefm.system import storage


def encode_shard(store: Store, shard: int, clip: Clip, *, careful: bool = False, **how: Unpack[How]) -> Commit:
    """Encode every row of `shard` and commit it.

    With `careful`, as after a process was lost, images that crash their decoder are found first, at the price of
    decoding all of them twice (see caching.crashing_images). Raises UnreadableError where rows would be left out that
    caching.permanent_failures does not allow, or where the storage does not answer, and StoreError where the shard
    cannot be written.
    """
    began = time.monotonic()
    rows = planned_rows(store.plan(shard))
    # What cannot be read becomes a status or a StoreError: any OSError that is left is about writing.
    with storage.writing_to(store.path), ExitStack() as stack:
        tar = stack.enter_context(_pixel_tar(store, shard)) if store.schema.pixels else None
        data = encode_planned(store, rows, clip, careful=careful, tar=tar, **how)
        _require_permanent(store, rows, data, how)
        digest = tar.finish() if tar else None
    return _commit(store, shard, rows, data, digest, clip, began)


def retry_shard(store: Store, shard: int, clip: Clip, *, careful: bool = False, **how: Unpack[How]) -> Commit:
    """As `encode_shard`, but only for the rows of a finished shard that have no embedding; the others stay. Where rows
    have crashed their decoder, it is always `careful`."""
    began = time.monotonic()
    rows, commit, data = planned_rows(store.plan(shard)), store.commit(shard), ShardData(store.shard_arrays(shard))
    if commit is not None and digest_arrays(*data.arrays.values()) != commit.digest:
        raise StoreError(f"{store.path}: the arrays of shard {shard} are not those that were committed", remedy=DAMAGED)
    failed = data.failed()
    left = [rows[i] for i in failed]
    careful = careful or bool((data.arrays[STATUS] == Status.CRASHED).any())
    with storage.writing_to(store.path), tempfile.TemporaryFile() as spool:
        tar = PixelTar(spool) if store.schema.pixels else None
        data.replace(failed, encode_planned(store, left, clip, careful=careful, tar=tar, **how))
        _require_permanent(store, rows, data, how)
        digest = _merge_pixels(store, shard, data, failed, spool) if tar else None
    before = commit.seconds if commit else 0.0  # the time of a shard is all that was spent on it
    return _commit(store, shard, rows, data, digest, clip, began - before)


def _require_permanent(store: Store, rows: Rows, data: ShardData, how: How) -> None:
    if store.schema.kind == "image" and not is_addition(store.schema):
        accept_missing = how.get("accept_missing", False)
        require_permanent(store, rows, data.arrays[STATUS], data.reasons, accept_missing=accept_missing)


def _commit(
    store: Store, shard: int, rows: Rows, data: ShardData, pixels: str | None, clip: Clip, began: float
) -> Commit:
    failures = [
        Failure(
            row=rows[i].row,
            key=rows[i].key,
            file=getattr(rows[i], "file", ""),  # a sentence has none
            status=Status(data.arrays[STATUS][i]).name,
            reason=data.reasons[i],
        )
        for i in data.failed().tolist()
    ]
    device, seconds = str(clip.device), time.monotonic() - began - data.waited
    return store.write_shard(shard, data.arrays, failures, pixels=pixels, device=device, seconds=seconds)


# -- the tar of JPEGs, of a store with pixels -------------------------------------------------------------------------


@contextmanager
def _pixel_tar(store: Store, shard: int) -> Iterator[PixelTar]:
    """The shard's tar to write. An earlier commit is removed before the tar is replaced: it names places in the old
    tar."""
    with pixel_tar(storage.join(store.path, pixels_path(shard))) as tar:
        yield tar
        remove_commit(store.path, shard)


def _merge_pixels(store: Store, shard: int, data: ShardData, retried: np.ndarray[Any, Any], spool: IO[bytes]) -> str:
    """Write the shard's tar again, in order of row; returns its digest. The JPEGs of `retried` rows come from `spool`,
    all others from the tar as it was."""
    index_N3, first = data.arrays[PIXEL_INDEX], store.schema.shard_range(shard)[0]
    has_jpeg = np.flatnonzero(index_N3[:, 1] > 0)
    new = set(retried.tolist())
    with _pixel_tar(store, shard) as tar:
        kept = _kept_jpegs(store, first + np.setdiff1d(has_jpeg, retried))
        for i in has_jpeg.tolist():
            jpeg = _between(spool, *index_N3[i, :2].tolist()) if i in new else next(kept)
            index_N3[i] = tar.add(first + i, jpeg)
        return tar.finish()


def _kept_jpegs(store: Store, rows_N: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """The store's own JPEGs. What cannot be read is a StoreError: an OSError would be taken for one of writing."""
    try:
        yield from store.pixels(rows_N)
    except OSError as error:
        what = f"{error.filename or store.path} cannot be read: {error.strerror or error}"
        remedy = "check its permissions and that the storage answers, and run the same command again"
        raise StoreError(what, remedy=f"{remedy}; what was finished is kept") from error


def _between(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)
