"""`search`: what one's own image or sentence is nearest to. It is the fastest way to see that a cache is sane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dimefm.errors import SourceError, StoreError
from dimefm.retrieval.open_search import note_search
from dimefm.retrieval.searched import Hit, Searched, Student, decoded
from dimefm.store.failures import require_embeddings
from dimefm.system import storage
from dimefm.system.inert_text import line
from dimefm.system.notes import note
from dimefm.system.wording import counted, hanging


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
    searched = Searched(path, student)
    store = searched.store
    encoded = {image: _read_image(image) for image in images}
    note(f"{counted(store.schema.rows, 'row')}: loading the {'student' if student else 'teacher'} ...")
    own = None if student else store.schema.teacher.preprocessing  # a student's is known when it is loaded
    pixels = [decoded(own, *both) for both in encoded.items()] if own else []
    rows = searched.open(device)
    with searched.encoder(teacher, pretrained, device) as encoder:
        pixels = pixels or [decoded(encoder.preprocessing, *both) for both in encoded.items()]
        by_name = dict(zip(encoded, pixels, strict=True))
        vectors = {
            "image": [encoder.of_image(by_name[image]) for image in images],
            "text": [encoder.of_text(text) for text in texts],
        }
    queries = {kind: np.concatenate(each) for kind, each in vectors.items() if each}
    note_search(searched.index, queries)
    found = [hits for kind, queries_QD in queries.items() for hits in rows.nearest(kind, queries_QD, top_k)]
    if queries and not any(found):
        require_embeddings(store)
        raise StoreError(f"{path}: nothing is found", remedy=f"search the store itself, {store.path}")
    return found


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


def _read_image(path: str) -> bytes:
    """The file of an image."""
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", remedy="give an image file") from None
