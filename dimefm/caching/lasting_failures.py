"""Which rows of a shard may be left without an embedding: a status is for good, so it must be of the image, and never
of the storage at that moment. Looked at before a shard is committed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_schemas import Status
from cache_schemas.plan import SourceFile
from dimefm.errors import RUN_AGAIN, SourceError, UnreadableError
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.sources.files import describe_change, stat_files
from dimefm.sources.parquet import SUFFIX as PARQUET
from dimefm.sources.parquet import forget_cells
from dimefm.sources.read_image import read_planned
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.read_ahead import in_order

_ASKED, _NEIGHBOURS = 64, 8  # rows that are asked for again
_LEAST = 32  # readable bytes in so many rows and not one image: that is the storage; fewer may be bad images
_OF_STORAGE = (Status.TRUNCATED, Status.UNDECODABLE)  # which a file that was changed gives, too

Rows = list[dict[str, Any]]


def require_lasting(
    store: Store, rows: Rows, status_N: np.ndarray[Any, Any], reasons: dict[int, str], *, accept_missing: bool
) -> None:
    """Raises UnreadableError where the shard of these `rows` must not be committed with this status:

    - images that were there when they were planned are gone. With `accept_missing` they may be, as long as they stay
      so and other files of the source can be read;
    - an image is broken in a file that is not what it was when it was planned;
    - not one of many images can be read, unless `accept_missing`.
    """
    failed = np.flatnonzero(status_N != Status.OK).tolist()
    planned = [i for i in failed if rows[i]["size"] > 0]  # the others were empty, or not there, when they were planned
    if missing := [i for i in planned if status_N[i] == Status.MISSING]:
        first = f"the first {rows[missing[0]]['key']!r}: {reasons[missing[0]]}"
        what = f"{len(missing):,} of {len(rows):,} images of a shard were there when they were planned and are gone"
        if not accept_missing:
            remedy = f"put them back, or mount what they are on, and {RUN_AGAIN}; or leave them out by --accept-missing"
            raise UnreadableError(f"{what}, {first}", remedy=remedy)
        _require_gone([rows[i] for i in missing], what)
        _require_neighbours(store, [row for i, row in enumerate(rows) if status_N[i] != Status.MISSING], what)
    _require_unchanged(store, [rows[i] for i in planned if status_N[i] in _OF_STORAGE])
    unread = [i for i in planned if status_N[i] != Status.NOT_FINITE]
    if len(unread) >= _LEAST and not accept_missing and len(unread) == sum(row["size"] > 0 for row in rows):
        what = f"not one of the {len(unread):,} images of a shard can be read, the first is {rows[unread[0]]['key']!r}"
        remedy = f"look at the source and its storage, and {RUN_AGAIN}; or leave them out by --accept-missing"
        raise UnreadableError(f"{what} in {rows[unread[0]]['file']}: {reasons[unread[0]]}", remedy=remedy)


def _require_gone(missing: Rows, what: str) -> None:
    forget_cells()  # blocks that were kept would answer for a file that is gone
    for row, answers in zip(asked := _some(missing, _ASKED), in_order(_answers, asked), strict=True):
        if answers:
            remedy = f"the storage was away for a moment: {RUN_AGAIN}"
            raise UnreadableError(f"{what}, but {row['file']} is there again", remedy=remedy)


def _require_neighbours(store: Store, others: Rows, what: str) -> None:
    """A file of `others`, or else of other shards, can be read now."""
    others = _that_are_read(others)
    if not others:
        rows_N = np.linspace(0, store.schema.rows - 1, min(_ASKED, store.schema.rows)).astype(np.int64)
        others = _that_are_read(store.samples(rows_N))
    forget_cells()
    if not any(in_order(_answers, asked := _some(others, _NEIGHBOURS))):
        such = f", such as {asked[0]['file']}" if asked else ""
        remedy = f"mount what they are on, or renew the credentials, and {RUN_AGAIN}"
        raise UnreadableError(f"{what}, and no other file can be read either{such}", remedy=remedy)


def _that_are_read(rows: Rows) -> Rows:
    """Those whose file is opened to read them: not the empty ones, nor those larger than is read."""
    return [row for row in rows if 0 < row["size"] <= MAX_BYTES]


def _require_unchanged(store: Store, rows: Rows) -> None:
    """The files of these rows are of the size and time that they were planned with."""
    if not rows:
        return
    before: dict[str, SourceFile] = {}
    for row in rows:
        path, column, _ = row["file"].partition(f"{PARQUET}#")
        path += PARQUET if column else ""
        before[path] = SourceFile(path, row["size"], 0)
    try:
        if storage.is_url(rows[0]["file"]):
            storage.filesystem(rows[0]["file"])[0].invalidate_cache()
        now = stat_files(list(before))
    except SourceError as error:
        raise UnreadableError(error.what, remedy=f"put it back as it was, and {RUN_AGAIN}") from error
    if any(describe_change(before[file.path], file) for file in now):  # or the file holds more than this one image
        files = store.source_files()
        files = files.filter(pc.is_in(files["path"], pa.array(list(before))))
        before |= {file["path"]: SourceFile(**file) for file in files.to_pylist()}
    for file in now:
        if found := describe_change(before[file.path], file):
            remedy = f"put it back as it was, its time too, and {RUN_AGAIN}; or cache into a new --out"
            raise UnreadableError(f"the source has changed since it was planned: {found}", remedy=remedy)


def _answers(row: dict[str, Any]) -> bool:
    """Whether the file of a row can be read."""
    try:
        read_planned(row["file"], row["offset"], row["size"])
    except OSError:
        return False
    except DecodeError:
        return True
    return True


def _some(rows: Rows, count: int) -> Rows:
    """At most `count` of them, spread evenly."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]
