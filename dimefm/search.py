"""`dimefm search`: what a person's own image or sentence is nearest to: the fastest way to see that a cache is sane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache_schemas.index import SIDECAR_FILE
from dimefm import storage
from dimefm.clip import Clip, load_clip
from dimefm.decode import DecodeError
from dimefm.errors import MismatchError, SourceError
from dimefm.preprocess import Preprocess
from dimefm.retrieval import open_search
from dimefm.store import Store


@dataclass(frozen=True)
class Hit:
    """A row of the store with its cosine similarity to the query; `entry` is the plan's: key and text, or key, file and
    where in it."""

    score: float
    row: int
    entry: dict[str, Any]


def search(
    path: str,
    *,
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
    top_k: int = 10,
    teacher: str | None = None,
    pretrained: str | None = None,
    device: str | None = None,
) -> list[list[Hit]]:
    """The `top_k` rows nearest to each image file and then to each sentence, best first. `path` is an index, or a store
    that is searched exactly; its teacher encodes the queries, from where it was or from `teacher`.

    Raises StoreError for what is neither, SourceError for an image that cannot be read, TeacherError or MismatchError
    for a teacher that is not to be had or is another.
    """
    index = path if storage.exists(storage.join(path, SIDECAR_FILE)) else None
    store = _store_of(index) if index else Store(path)
    clip = _teacher(store, teacher, pretrained, device)
    queries_QD = torch.cat([_encode_image(clip, image) for image in images] + [clip.encode_texts([t]) for t in texts])
    found, _, _ = open_search(store, index, device)
    # As float16, which is how a store would hold them.
    scores_QK, rows_QK = found.search(queries_QD.cpu().half().float().numpy(), min(top_k, store.schema.rows))
    return [_hits(store, scores_K, rows_K) for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)]


def _store_of(index: str) -> Store:
    from dimefm.index import read_sidecar

    return Store(read_sidecar(storage.absolute(index)).store)


def _teacher(store: Store, teacher: str | None, pretrained: str | None, device: str | None) -> Clip:
    known = store.schema.teacher
    clip = load_clip(teacher or known.name, pretrained if teacher else known.pretrained, device=device)
    differences = known.differences(clip.identity, ignore=("precision",))
    if differences:
        what = f"{clip.identity.name} is not the teacher of {store.path}: {'; '.join(differences)}"
        raise MismatchError(what, remedy="give --teacher, where that of the store is now")
    return clip


def _encode_image(clip: Clip, path: str) -> torch.Tensor:
    try:
        pixels = Preprocess(clip.identity.preprocessing)(storage.read_bytes(path))
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceError(f"{path}: {reason}", remedy="give an image file") from None
    return clip.encode_images(pixels[None])


def _hits(store: Store, scores_K: np.ndarray[Any, Any], rows_K: np.ndarray[Any, Any]) -> list[Hit]:
    found_K = rows_K >= 0
    rows = rows_K[found_K]
    entries = store.samples(rows)
    return [
        Hit(float(score), int(row), entry) for score, row, entry in zip(scores_K[found_K], rows, entries, strict=True)
    ]
