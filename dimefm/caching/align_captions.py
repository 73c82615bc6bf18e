"""Write whose captions the sentences of a text store are: pairs, in the form in which retrieve writes them.

A caption is in the store once, however many images have it, and however it is written if the tokenizer makes no
difference: so it is found by the hash of its canonical form.

Shapes: N image rows of a shard or of a part of it, K captions per image, T sentences, D embedding width.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_schemas import PairsStore, Status
from cache_schemas.embedding_store import COMMITS
from cache_schemas.pairs import CAPTION_PAIRS, HITS, HITS_COMMIT, SCORE, TEXT_ROW
from cache_schemas.plan import CAPTIONS
from dimefm.caching.repeats import as_array
from dimefm.store.count_hits import count_hits
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import is_planned
from dimefm.store.pairs_store import Pairs, pairs_schema
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.progress import Progress

_ROWS = 1024  # images whose captions are scored at once
_NO_SEARCH = "captions"  # in place of an index


def align_captions(images: Store, texts: Store, canonical: Callable[[str], str] | None) -> Pairs:
    """Write the pairs into the store `texts`, or go on where an earlier run stopped; finished ones are opened.

    `canonical` is that of the teacher's tokenizer, by which `texts` was planned (models.tokenizer). Shards whose images
    were encoded again since are done again, and all of them where the texts were. Raises StoreError where the pairs
    cannot be written, or another process writes them.
    """
    out = storage.join(texts.path, CAPTION_PAIRS)
    with writing(out, of_use=lambda files: any(name.startswith(f"{COMMITS}/") for name in files)):
        pairs = _open_or_create(images, texts, out)
        pending, hits = pairs.pending(images), storage.join(out, HITS_COMMIT)
        if not pending and storage.exists(hits):
            return pairs
        storage.remove_leftovers(out)
        storage.remove_file(hits)  # it counts what changes now
        rows_of, done = _Rows(texts, canonical), pairs.schema.shards - len(pending)
        with Progress("aligning captions", pairs.schema.shards, "shard", done) as progress:
            for number, (shard, digest) in enumerate(sorted(pending.items()), 1):
                _align_shard(pairs, images, texts, rows_of, shard, digest)
                progress.at(done + number)
        count_hits(pairs)
    return pairs


def _open_or_create(images: Store, texts: Store, out: str) -> Pairs:
    """The pairs that an earlier run began, if they are of what is in both stores now, or new ones."""
    if is_planned(out):
        pairs = Pairs(out)
        asked = _schema(images, texts, pairs.schema.top_k)  # which follows from the plan of the images
        if replace(pairs.schema, images=asked.images, texts=asked.texts) == asked:  # stores may be moved
            return pairs
        for name in (COMMITS, TEXT_ROW, SCORE, HITS):  # of other embeddings: all of it follows from the stores
            storage.remove_folder(storage.join(out, name))
        storage.remove_file(storage.join(out, "zarr.json"))
    with storage.writing_to(out):
        return Pairs.create(out, _schema(images, texts, _most_captions(images)))


def _schema(images: Store, texts: Store, most: int) -> PairsStore:
    return pairs_schema(images, texts, kind="captions", index=_NO_SEARCH, index_digest=_NO_SEARCH, top_k=most)


def _captions(images: Store, shard: int) -> pa.ChunkedArray:
    """The captions of the images of a shard: lists of strings."""
    return images.entries(np.arange(*images.schema.shard_range(shard)), (CAPTIONS,))[CAPTIONS]


def _most_captions(images: Store) -> int:
    """The captions of the image that has the most."""
    shards = range(images.schema.shards)
    most: list[int] = [pc.max(pc.list_value_length(_captions(images, shard))).as_py() for shard in shards]
    return max([1, *most])


class _Rows:
    """The row of a caption in the text store, by the hash of its canonical form; 12 bytes for each, and 28
    while they are sorted."""

    def __init__(self, texts: Store, canonical: Callable[[str], str] | None) -> None:
        self._canonical = canonical
        hashes = array("q")
        for shard in range(texts.schema.shards):
            hashes.extend(map(self._hash, texts.plan(shard)["text"].to_pylist()))
        hash_T = as_array(hashes)
        self._row_T = np.argsort(hash_T, kind="stable").astype(np.int32)
        self._hash_T = hash_T[self._row_T]

    def of(self, captions: list[str]) -> np.ndarray[Any, Any]:
        """Rows, int32; -1 for a caption of which the tokenizer leaves nothing: the store does not have it."""
        hashes = np.array([self._hash(one) for one in captions], np.int64)
        place = np.searchsorted(self._hash_T, hashes).clip(max=len(self._hash_T) - 1)
        found: np.ndarray[Any, Any] = np.where(self._hash_T[place] == hashes, self._row_T[place], np.int32(-1))
        return found

    def _hash(self, text: str) -> int:
        return hash(self._canonical(text) if self._canonical else text)


def _align_shard(pairs: Pairs, images: Store, texts: Store, rows_of: _Rows, shard: int, digest: str) -> None:
    """Write and commit the pairs of a shard. All is read before anything is written."""
    began, (start, stop) = time.monotonic(), pairs.schema.shard_range(shard)
    status_N = images.status(start, stop)
    row_NK = _rows_by_image(_captions(images, shard), rows_of, (stop - start, pairs.schema.top_k))
    row_NK[status_N != Status.OK] = -1
    score_NK = np.full(row_NK.shape, np.nan, np.float16)
    for at in range(0, len(row_NK), _ROWS):
        part = slice(at, min(at + _ROWS, len(row_NK)))
        row_NK[part], score_NK[part] = _scored(images, texts, row_NK[part], start + at)
    pairs.write_shard(
        shard, images, status_N, row_NK, score_NK,
        device="cpu", seconds=time.monotonic() - began, digest=digest,
    )  # fmt: skip


def _rows_by_image(captions: pa.ChunkedArray, rows_of: _Rows, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The rows of the captions of each image, each once, int32 (N, K), in the order of the source; -1 for none."""
    row_NK = np.full(shape, -1, np.int32)
    rows = rows_of.of(pc.list_flatten(captions).to_pylist()).tolist()
    ends = np.cumsum(pc.list_value_length(captions).to_numpy()).tolist()
    for place, (start, stop) in enumerate(pairwise([0, *ends])):
        own = dict.fromkeys(rows[start:stop])  # two may be the same for the tokenizer
        own.pop(-1, None)
        row_NK[place, : len(own)] = list(own)
    return row_NK


def _scored(
    images: Store, texts: Store, row_NK: np.ndarray[Any, Any], start: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows and cosines, both (N, K), best first, of the captions of images from `start` on that have an embedding."""
    score_NK = np.full(row_NK.shape, -np.inf, np.float32)
    image_ND = images.read(start, start + len(row_NK)).astype(np.float32)
    for k in range(row_NK.shape[1]):
        places = np.flatnonzero(row_NK[:, k] >= 0)
        if len(places):
            text_ND = texts.gather(row_NK[places, k]).astype(np.float32)
            usable_N = text_ND.any(axis=1)
            score = np.einsum("nd,nd->n", image_ND[places], text_ND)
            score_NK[places[usable_N], k] = score[usable_N]
    order_NK = np.argsort(-score_NK, axis=1, kind="stable")
    score_NK = np.take_along_axis(score_NK, order_NK, axis=1)
    none_NK = np.isneginf(score_NK)
    return np.where(none_NK, -1, np.take_along_axis(row_NK, order_NK, axis=1)), np.where(none_NK, np.nan, score_NK)
