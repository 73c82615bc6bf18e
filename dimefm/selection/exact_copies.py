"""Images whose files are equal to the last byte.

A store keeps no digest of its images, and to read all of them again would take as long as to cache them. So an image is
read only if another one has as many bytes and nearly the same embedding.

Shapes: T images of the store, C candidates, N images of one size, R copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dimefm.errors import DimefmError
from dimefm.images.decode import DecodeError
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store
from dimefm.system.notes import note
from dimefm.system.progress import Progress
from dimefm.system.wording import counted

_ALIKE = 0.98  # the same bytes in another batch, or in bf16, give a cosine that is far above it
_BLOCK = 4096  # rows whose embeddings are held at a time, unless more images have the same size
_THREADS = 8
_Array = np.ndarray[Any, Any]


def exact_copies(store: Store, order_C: _Array) -> tuple[_Array, _Array]:
    """Of the rows `order_C`, best first, those that have the same bytes as a better one, and that one: int64 (R,) each.
    Images that cannot be read any more are no copies; a note counts them."""
    suspects = np.concatenate([order_C[:0], *_suspects(store, np.sort(order_C))])
    rank_T = np.full(store.schema.rows, -1, np.int64)
    rank_T[order_C] = np.arange(len(order_C))
    suspects = suspects[np.argsort(rank_T[suspects])]
    first: dict[bytes, int] = {}
    rows, likes, unread = list[int](), list[int](), 0
    for row, digest in zip(suspects.tolist(), _digests(store, suspects), strict=True):
        if digest is None:
            unread += 1
        elif digest in first:
            rows.append(row)
            likes.append(first[digest])
        else:
            first[digest] = row
    if unread:
        note(f"{counted(unread, 'image')} cannot be read now, and so cannot be compared byte by byte")
    return np.array(rows, np.int64), np.array(likes, np.int64)


def _suspects(store: Store, rows_C: _Array) -> Iterator[_Array]:
    """The rows that have as many bytes as another and nearly its embedding."""
    size_C = store.entries(rows_C, ("size",))["size"].to_numpy()
    order = np.lexsort((rows_C, size_C))
    rows_C, size_C = rows_C[order], size_C[order]
    begins = np.flatnonzero(np.r_[True, size_C[1:] != size_C[:-1]])
    counts = np.diff(np.r_[begins, len(size_C)])
    several = counts > 1
    begins, ends = begins[several], (begins + counts)[several]
    with Progress("comparing", int(counts[several].sum()), "image") as progress:
        done, at = 0, 0
        while at < len(begins):
            last = max(at + 1, int(np.searchsorted(ends, begins[at] + _BLOCK, side="right")))
            rows_N = np.concatenate([rows_C[b:e] for b, e in zip(begins[at:last], ends[at:last], strict=True)])
            group_N = np.repeat(np.arange(last - at), (ends - begins)[at:last])
            yield rows_N[_alike(store.gather(rows_N).astype(np.float32), group_N)]
            done, at = done + len(rows_N), last
            progress.at(done)


def _alike(value_ND: _Array, group_N: _Array) -> _Array:
    """Which rows are near to another of their group, bool (N,)."""
    value_ND /= np.maximum(np.linalg.norm(value_ND, axis=1, keepdims=True), 1e-12)
    found_N = np.zeros(len(value_ND), bool)
    begins = np.searchsorted(group_N, np.arange(group_N[-1] + 2))
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        part_ND = value_ND[begin:end]
        for at in range(0, len(part_ND), _BLOCK):  # of one size there may be any number
            cosine_NN = part_ND[at : at + _BLOCK] @ part_ND.T
            own = np.arange(len(cosine_NN))
            cosine_NN[own, own + at] = -1
            found_N[begin + at : begin + at + len(cosine_NN)] = cosine_NN.max(axis=1) >= _ALIKE
    return found_N


def _digests(store: Store, rows_N: _Array) -> Iterator[bytes | None]:
    """The sha256 of the bytes of each image, in the order asked for; None for one that cannot be read."""
    places = [ImagePlace(one["file"], one["offset"], one["size"]) for one in store.samples(rows_N, ImagePlace._fields)]
    if not places:
        return
    with ThreadPoolExecutor(_THREADS) as pool, Progress("reading", len(places), "image") as progress:
        for done, digest in enumerate(pool.map(_digest, places), 1):
            progress.at(done)
            yield digest


def _digest(place: ImagePlace) -> bytes | None:
    try:
        return hashlib.sha256(read_encoded(place)).digest() if place.file else None
    except (DimefmError, DecodeError, OSError):
        return None
