"""The stores of a run's teachers: whether their rows are the same images, seen alike; and which rows all have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import Status
from cache_schemas.embedding_store import rows_path
from dimefm.errors import MismatchError, TrainingError
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.joined_store import open_images
from dimefm.training.config import TrainConfig

_COMPARED = {"image": ("key", "offset", "size"), "text": ("text",)}
"""Columns of a plan that say which sample a row is. The path of its file is not among them: a source may have moved."""
_BLOCK = 2**18  # rows that are compared at once


@dataclass(frozen=True)
class TeacherStores:
    """The finished stores of one teacher; `texts` is None where it has no sentences."""

    images: Store
    texts: Store | None


def open_teachers(config: TrainConfig) -> list[TeacherStores]:
    """Open the stores of each teacher. Raises StoreError for one that is unfinished or empty, MismatchError for stores
    that do not belong together, TrainingError for a teacher that lacks what a loss needs."""
    try:
        first, *more = (_open_teacher(*paths, config.image_weights) for paths in config.teachers)
    except MismatchError as error:
        if not config.more_images:
            raise
        remedy = "give --images and --texts of the teachers in the same order, those without sentences last"
        raise MismatchError(error.what, remedy=remedy) from None
    for one in (first, *more):
        if config.loss.logit_scale == "teacher" and not one.images.schema.teacher.has_text:
            what = f"the teacher of {one.images.path} has no text tower, and so no logit scale"
            raise TrainingError(what, remedy="give --set loss.logit_scale=fixed")
    for number, one in enumerate(more):
        _require_other_teacher(one.images, [before.images for before in (first, *more[:number])])
        require_same_images(first.images, one.images)
    return [first, *more]


def _open_teacher(images: str, texts: str | None, weights: Sequence[float]) -> TeacherStores:
    found = TeacherStores(open_images(images, weights), None if texts is None else Store(texts))
    sentences = [] if found.texts is None else [found.texts]
    for store, kind in (*((part, "image") for part in found.images.parts), *((one, "text") for one in sentences)):
        store.require_kind(kind)
        store.require_complete()
        require_embeddings(store)
        require_same_teacher(found.images, store)
    return found


def _require_other_teacher(store: Store, others: Sequence[Store]) -> None:
    """Raises MismatchError if one of the others is of the same teacher: more images were meant, perhaps."""
    for other in others:
        if not other.schema.teacher.differences(store.schema.teacher):
            what = f"{other.path} and {store.path} come from the same teacher"
            remedy = "give --images again for another teacher of the same images only; more images of one teacher are"
            raise MismatchError(what, remedy=f"{remedy} --images A.zarr::B.zarr")


def require_same_images(one: Store, other: Store) -> None:
    """Raises MismatchError unless row r of both image stores is the same image, seen through the same views."""
    require_same_rows(one, other)
    if one.schema.views is None and other.schema.views is None:
        return
    mine, theirs = (
        None if store.schema.views is None else replace(store.schema.views, count=1) for store in (one, other)
    )
    if mine != theirs or one.schema.pixels != other.schema.pixels:
        seen = " and ".join(f"{store.path} {_seen(store)}" for store in (one, other))
        remedy = "cache both with the same --views, --view-scale and --pixels"
        raise MismatchError(f"the teachers saw different views of an image: {seen}", remedy=remedy)


def _seen(store: Store) -> str:
    views, pixels = store.schema.views, store.schema.pixels
    if views is None:
        return "has whole images"
    facts = ", ".join(f"{name} {value}" for name, value in vars(views).items() if name != "count")
    return f"has views ({facts}) of {'the original images' if pixels is None else f'images of {pixels} px'}"


def require_same_rows(one: Store, other: Store) -> None:
    """Raises MismatchError, with the first row that differs, unless both stores have the same samples in the same
    order: images of the same key, place in their file and size, or the same sentences."""
    plans = _plans(one)
    if None not in plans and plans == _plans(other):
        return
    columns = _COMPARED[one.schema.kind]
    for start in range(0, max(one.schema.rows, other.schema.rows), _BLOCK):
        mine, theirs = (_entries(store, start, columns) for store in (one, other))
        if (place := _first_difference(mine, theirs)) is not None:
            samples = " and ".join(_sample(entries, place) for entries in (mine, theirs))
            what = f"{one.path} and {other.path} have other rows: row {start + place} is {samples}"
            remedy = "cache them from the same sources, with the same --limit and --shuffle"
            raise MismatchError(what, remedy=remedy)


def _plans(store: Store) -> list[str | None]:
    """The digests of the plans, by which equal ones need not be read."""
    return [store.schema.digests.get(rows_path(shard)) for shard in range(store.schema.shards)]


def _entries(store: Store, start: int, columns: tuple[str, ...]) -> pa.Table:
    rows_N = np.arange(start, max(start, min(start + _BLOCK, store.schema.rows)))
    return store.entries(rows_N, columns).select(columns)


def _first_difference(one: pa.Table, other: pa.Table) -> int | None:
    shared = min(len(one), len(other))
    same_N = np.ones(shared, bool)
    for name in one.column_names:
        mine, theirs = (table[name].slice(0, shared).to_numpy(zero_copy_only=False) for table in (one, other))
        same_N &= mine == theirs
    if not same_N.all():
        return int(same_N.argmin())
    return None if len(one) == len(other) else shared


def _sample(entries: pa.Table, place: int) -> str:
    if place >= len(entries):
        return "not there"
    return " ".join(f"{name} {value!r}" for name, value in entries.slice(place, 1).to_pylist()[0].items())


def require_same_sentences(stores: Sequence[Store]) -> None:
    """Raises MismatchError unless row r of all text stores is the same sentence, with an embedding in all or in none:
    what pairs and selections name by its row in the first store."""
    for other in stores[1:]:
        require_same_rows(stores[0], other)
        differs_N = np.flatnonzero(_has_embedding(stores[0]) != _has_embedding(other))
        if len(differs_N):
            what = f"row {differs_N[0]} has an embedding in only one of {stores[0].path} and {other.path}"
            raise MismatchError(what, remedy="cache both again, or train without --pairs and --selection")


def rows_of_all(stores: Sequence[Store]) -> np.ndarray[Any, Any] | None:
    """The rows that have an embedding in every store, int64 (N,), ascending; None where these are all that the first
    has."""
    first_N = _has_embedding(stores[0])
    all_N = np.logical_and.reduce([first_N, *map(_has_embedding, stores[1:])])
    return None if np.array_equal(first_N, all_N) else np.flatnonzero(all_N)


def _has_embedding(store: Store) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = store.status() == Status.OK
    return found
