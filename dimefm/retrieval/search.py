"""`search`: what one's own image or sentence is nearest to. It is the fastest way to see that a cache is sane.

Shapes: Q queries, D embedding width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import Preprocessing
from cache_schemas.index import SIDECAR_FILE
from dimefm.errors import MismatchError, SourceError, StoreError, TeacherError
from dimefm.images.decode import DecodeError
from dimefm.retrieval.index_sidecar import read_sidecar, store_of
from dimefm.retrieval.open_search import note_search, open_search, require_search
from dimefm.store.embedding_store import Store
from dimefm.store.failures import require_embeddings
from dimefm.system import storage
from dimefm.system.inert_text import line
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.notes import note
from dimefm.system.wording import counted, hanging

if TYPE_CHECKING:
    import torch

    from dimefm.models.clip import Clip


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


def search(
    path: str,
    *,
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
    top_k: int = 10,
    teacher: str | None = None,
    pretrained: str | None = None,
    student: Student | None = None,
    device: str | None = None,
) -> list[list[Hit]]:
    """The `top_k` rows nearest to each image file, and then those nearest to each sentence, best first.

    `path` is an index, or a store, which is searched exactly. The store's teacher encodes the queries; `teacher` says
    where it is now, if it was moved. Or else a `student` of this teacher does. Raises StoreError where `path` is
    neither or nothing is found, SourceError for an image that cannot be read, TeacherError where the teacher cannot be
    loaded, MismatchError where it is another, or the student is of another.
    """
    index = path if storage.exists(storage.join(path, SIDECAR_FILE)) else None
    store = _store_of_index(index) if index else _open_store(path)
    # Mistakes that are found cheaply are found before torch is imported and the teacher is loaded.
    require_search(store, index)
    if student:
        _require_student(student, store)
    encoded = [_read_image(image) for image in images]
    note(f"{counted(store.schema.rows, 'row')}: loading the {'student' if student else 'teacher'} ...")
    import torch

    with student.load() if student else nullcontext() as own:
        facts = own.identity.preprocessing if own else store.schema.teacher.preprocessing
        pixels = [_decoded(facts, *both) for both in zip(images, encoded, strict=True)]
        nearest = open_search(store, index, device)
        clip = own or load_teacher(store, teacher, pretrained, device)
        queries = {
            "image": [clip.encode_images(image[None]) for image in pixels],
            "text": [clip.encode_texts([text]) for text in texts],
        }
    queries = {kind: vectors for kind, vectors in queries.items() if vectors}
    if not queries:
        return []
    note_search(index, queries)
    found = []
    for kind, vectors in queries.items():
        # Rounded to the store's type, so that a row of the store has a cosine of 1 to itself.
        queries_QD = torch.cat(vectors).cpu().numpy().astype(store.schema.dtype).astype(np.float32)
        found.append(nearest.of_kind(kind).search(queries_QD, min(top_k, store.schema.rows)))
    scores_QK, rows_QK = map(np.concatenate, zip(*found, strict=True))
    if not (rows_QK >= 0).any():
        require_embeddings(store)
        raise StoreError(f"{path}: nothing is found", remedy=f"search the store itself, {store.path}")
    return [_hits(store, scores_K, rows_K) for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)]


def _require_student(student: Student, store: Store) -> None:
    """Raises MismatchError unless `student` was distilled from the teacher of the store."""
    if student.teacher is None:
        what = f"{student.name} does not say which teacher it was distilled from"
        raise MismatchError(what, remedy="give the run itself, or what dimefm export makes of it")
    if student.teacher != (known := store.schema.teacher).weights:
        what = f"{student.name} was not distilled from {known.name}, the teacher of {store.path}"
        digests = f"weights: {student.teacher[:16]} != {known.weights[:16]}"
        raise MismatchError(f"{what}: {digests}", remedy="search a store of the student's own teacher")


def facts(query: str, hits: Sequence[Hit]) -> dict[str, Any]:
    """A query and its hits, for a program. Of a sentence a hit has the `text`, of an image the `file`."""
    names = ("key", "text", "file")
    found = [
        {"score": hit.score, "row": hit.row, **{name: hit.entry[name] for name in names if name in hit.entry}}
        for hit in hits
    ]
    return {"query": query, "hits": found}


def show(query: str, hits: Sequence[Hit]) -> str:
    """A query, and below it each hit: cosine, row, sentence or key, and where it is from. Cosines have three digits:
    with float16 vectors a fourth is noise."""
    if not hits:
        return f"{line(query)}\n  nothing is found"
    width = len(str(max(hit.row for hit in hits)))
    lines = [hanging(f"  {hit.score:6.3f}  row {hit.row:<{width}}  ", _what(hit.entry)) for hit in hits]
    return "\n".join([line(query), *lines])


def _what(entry: dict[str, Any]) -> str:
    what, where = (entry["text"], entry["key"]) if "text" in entry else (entry["key"], entry["file"])
    return line(f"{' '.join(what.split())}  ({where})")


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


def _read_image(path: str) -> bytes:
    """The file of an image."""
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", remedy="give an image file") from None


def _decoded(facts: Preprocessing, path: str, data: bytes) -> torch.Tensor:
    """The image as the model takes it."""
    from dimefm.images.preprocess import Preprocess

    try:
        return Preprocess(facts)(data)
    except DecodeError as error:
        raise SourceError(f"{path}: {error}", remedy="give an image file") from None


def _hits(store: Store, scores_K: np.ndarray[Any, Any], rows_K: np.ndarray[Any, Any]) -> list[Hit]:
    found_K = rows_K >= 0
    rows = rows_K[found_K]
    entries = store.samples(rows)
    return [
        Hit(float(score), int(row), entry) for score, row, entry in zip(scores_K[found_K], rows, entries, strict=True)
    ]
