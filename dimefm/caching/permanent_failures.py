"""Whether the rows of a shard that failed have failed for good; asked before the shard is committed.

A status is permanent, so it must be a fact about the image, and never about the storage at that moment.

Shapes: N rows of the shard, or of the store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_schemas import Status
from cache_schemas.plan import PlannedImage, SourceFile, planned_rows
from dimefm.errors import RUN_AGAIN, SourceError, UnreadableError
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.sources.files import describe_change, stat_files
from dimefm.sources.parquet import split_column
from dimefm.sources.parquet_cells import forget_cells
from dimefm.sources.read_image import read_encoded
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.read_ahead import in_order

_ASKED, _NEIGHBOURS = 64, 8  # missing images, and images of other files, that are asked for again
_LEAST = 32  # if a shard has this many images and none can be read, it is the storage; fewer may all be bad
_OF_STORAGE = (Status.TRUNCATED, Status.UNDECODABLE)  # as also for a file that was changed since

Images = list[PlannedImage]


def require_permanent(
    store: Store, images: Images, status_N: np.ndarray[Any, Any], reasons: dict[int, str], *, accept_missing: bool
) -> None:
    """Raises UnreadableError where the shard of these `images` must not be committed with this status:

    - images that were there when they were planned are gone. With `accept_missing` they may be, if they stay gone and
      other files of the source can be read;
    - an image is broken in a file that has changed since it was planned;
    - not one of many images can be read, unless `accept_missing`.
    """
    failed = np.flatnonzero(status_N != Status.OK).tolist()
    there = [i for i in failed if images[i].size > 0]  # the others were empty or absent when they were planned
    if missing := [i for i in there if status_N[i] == Status.MISSING]:
        first = f"the first {images[missing[0]].key!r}: {reasons[missing[0]]}"
        what = f"{len(missing):,} of {len(images):,} images of a shard were there when they were planned and are gone"
        if not accept_missing:
            remedy = f"put them back, or mount what they are on, and {RUN_AGAIN}; or leave them out by --accept-missing"
            raise UnreadableError(f"{what}, {first}", remedy=remedy)
        _require_gone([images[i] for i in missing], what)
        _require_others(store, [image for i, image in enumerate(images) if status_N[i] != Status.MISSING], what)
    _require_unchanged(store, [images[i] for i in there if status_N[i] in _OF_STORAGE])
    unread = [i for i in there if status_N[i] != Status.NOT_FINITE]
    if len(unread) >= _LEAST and not accept_missing and len(unread) == sum(image.size > 0 for image in images):
        first_unread = images[unread[0]]
        what = f"not one of the {len(unread):,} images of a shard can be read, the first is {first_unread.key!r}"
        remedy = f"look at the source and its storage, and {RUN_AGAIN}; or leave them out by --accept-missing"
        raise UnreadableError(f"{what} in {first_unread.file}: {reasons[unread[0]]}", remedy=remedy)


def _require_gone(missing: Images, what: str) -> None:
    """Raises UnreadableError where one of these images can be read again."""
    forget_cells()  # Parquet blocks in memory would answer for a file that is gone
    asked = _spread(missing, _ASKED)
    for image, can_be_read in zip(asked, in_order(_can_be_read, asked), strict=True):
        if can_be_read:
            remedy = f"the storage was away for a moment: {RUN_AGAIN}"
            raise UnreadableError(f"{what}, but {image.file} is there again", remedy=remedy)


def _require_others(store: Store, others: Images, what: str) -> None:
    """Raises UnreadableError unless one of `others`, or else of the images of other shards, can be read now."""
    others = _read_from_a_file(others)
    if not others:
        rows_N = np.linspace(0, store.schema.rows - 1, min(_ASKED, store.schema.rows)).astype(np.int64)
        others = _read_from_a_file(planned_rows(store.entries(rows_N)))
    forget_cells()
    asked = _spread(others, _NEIGHBOURS)
    if not any(in_order(_can_be_read, asked)):
        such = f", such as {asked[0].file}" if asked else ""
        remedy = f"mount what they are on, or renew the credentials, and {RUN_AGAIN}"
        raise UnreadableError(f"{what}, and no other file can be read either{such}", remedy=remedy)


def _read_from_a_file(images: Images) -> Images:
    """The images for which a file is opened: not the empty ones, nor those above the limit."""
    return [image for image in images if 0 < image.size <= MAX_BYTES]


def _require_unchanged(store: Store, images: Images) -> None:
    """Raises UnreadableError unless the files of these images have the size and time that they were planned with."""
    if not images:
        return
    before: dict[str, SourceFile] = {}
    for image in images:
        path, _ = split_column(image.file)
        before[path] = SourceFile(path, image.size, 0)
    try:
        if storage.is_url(images[0].file):
            storage.filesystem(images[0].file)[0].invalidate_cache()
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


def _can_be_read(image: PlannedImage) -> bool:
    try:
        read_encoded(image)
    except OSError:
        return False
    except DecodeError:
        return True
    return True


def _spread(images: Images, count: int) -> Images:
    """At most `count` of them, evenly spread."""
    return [images[i] for i in np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64))]
