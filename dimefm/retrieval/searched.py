"""A store that is searched with queries of a user, as `search` and `explore` do. Each part is opened by a call of its
own, so that mistakes are found before torch is imported and the teacher is loaded.

Shapes: Q queries, N rows, D embedding width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import Preprocessing
from cache_schemas.index import SIDECAR_FILE
from dimefm.errors import MismatchError, SourceError, StoreError, TeacherError
from dimefm.images.decode import DecodeError
from dimefm.retrieval.index_sidecar import read_sidecar, store_of
from dimefm.retrieval.open_search import open_search, require_search
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path

if TYPE_CHECKING:
    import torch

    from dimefm.models.clip import Clip
    from dimefm.retrieval.exact_search import Search


@dataclass(frozen=True)
class Hit:
    """A row of the store with its cosine similarity to the query. `entry` is its entry in the store's plan: for a
    sentence its key and text, for an image its key, file and place in the file."""

    score: float
    row: int
    entry: dict[str, Any]


@dataclass(frozen=True)
class Student:
    """A student that encodes the queries in place of the teacher that it was distilled from. `teacher` is the digest of
    the teacher's weights, None where the student does not say it."""

    name: str
    teacher: str | None
    load: Callable[[], AbstractContextManager[Clip]]


class Searched:
    """A store, or the store of an index, to be searched by the index or exactly."""

    def __init__(self, path: str, student: Student | None = None) -> None:
        """Raises StoreError where `path` is neither store nor index, MismatchError for a student of another teacher."""
        self.index = path if storage.exists(storage.join(path, SIDECAR_FILE)) else None
        self.store = _store_of_index(path) if self.index else _open_store(path)
        self.student = student
        require_search(self.store, self.index)
        if student:
            _require_student(student, self.store)

    def open(self, device: str | None = None, *, keep: bool = False) -> SearchedRows:
        """Open the search itself; `keep` as in open_search. Raises as it does."""
        return SearchedRows(self.store, open_search(self.store, self.index, device, keep=keep))

    @contextmanager
    def encoder(
        self, teacher: str | None = None, pretrained: str | None = None, device: str | None = None
    ) -> Iterator[Encoder]:
        """What encodes queries: the student, or else the teacher of the store, which is where `teacher` says if it was
        moved. Raises TeacherError where it cannot be loaded, MismatchError where it is another."""
        if self.student:
            with self.student.load() as clip:
                yield Encoder(self.store, clip, clip.identity.preprocessing)
        else:
            clip = load_teacher(self.store, teacher, pretrained, device)
            yield Encoder(self.store, clip, self.store.schema.teacher.preprocessing)


class SearchedRows:
    """The rows of a store, ready to be searched."""

    def __init__(self, store: Store, search: Search) -> None:
        self._store, self._search = store, search

    def nearest(self, kind: str, queries_QD: np.ndarray[Any, Any], k: int) -> list[list[Hit]]:
        """The `k` rows nearest to each query, which is the embedding of an "image" or a "text", best first."""
        found = self._search.of_kind(kind).search(queries_QD, min(k, self._store.schema.rows))
        return [_hits(self._store, scores_K, rows_K) for scores_K, rows_K in zip(*found, strict=True)]


class Encoder:
    """A model that encodes queries for a store: embeddings float32 (1, D), rounded to the type of the store, so that a
    row of the store has a cosine of 1 to itself."""

    def __init__(self, store: Store, clip: Clip, preprocessing: Preprocessing) -> None:
        self._store, self._clip, self.preprocessing = store, clip, preprocessing

    def of_image(self, pixels_3HW: torch.Tensor) -> np.ndarray[Any, Any]:
        """The embedding of an image that `decoded` returned."""
        return self._rounded(self._clip.encode_images(pixels_3HW[None]))

    def of_text(self, text: str) -> np.ndarray[Any, Any]:
        """The embedding of a sentence. Raises TeacherError where the model has no text tower."""
        return self._rounded(self._clip.encode_texts([text]))

    def _rounded(self, vectors_QD: torch.Tensor) -> np.ndarray[Any, Any]:
        rounded: np.ndarray[Any, Any] = vectors_QD.cpu().numpy().astype(self._store.schema.dtype).astype(np.float32)
        return rounded


def decoded(facts: Preprocessing, name: str, data: bytes) -> torch.Tensor:
    """An encoded image as the model takes it. Raises SourceError, with the `name` of the image, where it is none."""
    from dimefm.images.preprocess import Preprocess

    try:
        return Preprocess(facts)(data)
    except DecodeError as error:
        raise SourceError(f"{name}: {error}", remedy="give an image file") from None


def _require_student(student: Student, store: Store) -> None:
    """Raises MismatchError unless `student` was distilled from the teacher of the store."""
    if student.teacher is None:
        what = f"{student.name} does not say which teacher it was distilled from"
        raise MismatchError(what, remedy="give the run itself, or what dimefm export makes of it")
    if student.teacher != (known := store.schema.teacher).weights:
        what = f"{student.name} was not distilled from {known.name}, the teacher of {store.path}"
        digests = f"weights: {student.teacher[:16]} != {known.weights[:16]}"
        raise MismatchError(f"{what}: {digests}", remedy="search a store of the student's own teacher")


def _store_of_index(path: str) -> Store:
    folder = storage.absolute(path)
    return store_of(folder, read_sidecar(folder))


def _open_store(path: str) -> Store:
    if not storage.exists(storage.join(path, "zarr.json")):
        what = f"{path} is neither a dimefm store nor an index"
        remedy = "give the --out of cache-images, cache-texts or build-index"
        raise StoreError(what, remedy=did_you_mean_path(path, remedy))
    return Store(path)


def load_teacher(store: Store, teacher: str | None, pretrained: str | None, device: str | None) -> Clip:
    """The teacher of a store, from where it was when that was cached, or else from `teacher` and `pretrained`. Raises
    TeacherError where it cannot be loaded, MismatchError where it is another."""
    from dimefm.models.clip import load_clip, require_teacher
    from dimefm.models.hub import require_cached

    known, remedy = store.schema.teacher, "give --teacher, where the store's teacher is now"
    if not teacher:
        require_cached(known.name, store.path)
    try:
        name, tag = teacher or known.name, pretrained if teacher else known.pretrained
        clip = load_clip(name, tag, known=known, device=device)
    except TeacherError as error:
        if teacher:
            raise
        raise TeacherError(error.what, remedy=remedy) from error
    require_teacher(clip, known, store.path, remedy=remedy, any_precision=True)
    return clip


def _hits(store: Store, scores_K: np.ndarray[Any, Any], rows_K: np.ndarray[Any, Any]) -> list[Hit]:
    found_K = rows_K >= 0
    rows = rows_K[found_K]
    entries = store.samples(rows)
    return [
        Hit(float(score), int(row), entry) for score, row, entry in zip(scores_K[found_K], rows, entries, strict=True)
    ]
