"""Pseudo texts: for every image its nearest sentences, and from them the visually grounded part of a corpus.

Shapes: N image rows of a shard, D width, K sentences an image, T sentences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import zarr

from cache_schemas import Commit, Failure, PairsStore, SchemaError, Selection, Status, digest_of
from cache_schemas.embedding_store import ATTRIBUTES_KEY, COMMITS, commit_path
from cache_schemas.pairs import HITS, HITS_COMMIT, SCORE, TEXT_ROW
from dimefm import storage
from dimefm.arrays import (
    array_of,
    create_array,
    digest_arrays,
    group_attributes,
    open_group,
    reading_zarr,
    write_attributes,
    write_rows,
    zarr_place,
)
from dimefm.commits import make_commit, remove_commit, write_commit
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.exact import valid_rows
from dimefm.lease import require_held
from dimefm.lock import writing
from dimefm.sources.files import reading_ahead
from dimefm.store import Store, by_chunks, open_direct, require_same_data


class Search(Protocol):
    """Nearest rows of a store: `dimefm.exact.ExactSearch` or `dimefm.index.Index`. `batch` queries at once are best;
    `device` is what computes."""

    batch: int
    device: str

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows int64 (Q, K), best first; -1 where there are fewer."""


_DAMAGED = "delete the folder and retrieve again"
AGAIN = "run the same dimefm retrieve again: it does the shards whose images have changed, and counts anew"
AGAIN_TEXTS = "retrieve into another --out, with an index that was brought up to date if there is one"


class Pairs:
    """A pseudo-text store on disk."""

    def __init__(self, path: str) -> None:
        """Open one. Raises StoreError where there is none, SchemaError where its attributes are not valid."""
        self.path = storage.absolute(path)
        self.group: Any = open_group(self.path)
        self.schema = PairsStore.parse(group_attributes(self.group, self.path), storage.join(self.path, "zarr.json"))

        self._direct = {
            name: open_direct(self.path, name, array_of(self.group, self.path, name)) for name in (TEXT_ROW, SCORE)
        }

    def __reduce__(self) -> tuple[type[Pairs], tuple[str]]:
        return Pairs, (self.path,)  # another process opens it anew

    @staticmethod
    def create(path: str, schema: PairsStore) -> Pairs:
        """Make the arrays, and last the attributes."""
        path = storage.absolute(path)
        group = zarr.open_group(zarr_place(path), mode="a")
        shape, chunk = (schema.rows, schema.top_k), (min(schema.shard_rows, 1024), schema.top_k)
        create_array(group, TEXT_ROW, shape, "int32", chunk, schema.shard_rows)
        create_array(group, SCORE, shape, "float16", chunk, schema.shard_rows, fill=float("nan"))
        create_array(group, HITS, (schema.text_rows,), "uint32", (65536,), 65536)
        require_held(path)
        write_attributes(path, (TEXT_ROW, SCORE, HITS), schema.to_json())
        return Pairs(path)

    def text_rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of the text store by image, best first, int32 (N, K); -1 where the image has none."""
        return self._read(TEXT_ROW, start, stop)

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`text_rows` of any image rows in any order, int32 (N, K)."""
        direct = self._direct[TEXT_ROW]
        if direct is not None:
            return direct.gather(rows_N)
        with reading_zarr(storage.join(self.path, TEXT_ROW)):
            return np.asarray(self.group[TEXT_ROW].oindex[rows_N])

    @property
    def by_chunks(self) -> bool:
        """As Store.by_chunks, of the sentences of images."""
        return by_chunks(self.path, self._direct[TEXT_ROW])

    def scores(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Cosine similarities, float16 (N, K)."""
        return self._read(SCORE, start, stop)

    def hits(self) -> np.ndarray[Any, Any]:
        """By sentence, how many images have it among their top k, uint32 (T,). Raises StoreError if unfinished, or
        damaged."""
        expected = self.selection().digest
        try:
            with reading_zarr(storage.join(self.path, HITS)):
                hits_T = np.asarray(self.group[HITS][:])
        except ValueError:  # a checksum
            hits_T = np.empty(0, np.uint32)
        if digest_arrays(hits_T) != expected:
            raise StoreError(f"{storage.join(self.path, HITS)} is damaged: its checksum does not fit", remedy=_DAMAGED)
        return hits_T

    def _read(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        direct, size = self._direct[name], self.schema.shard_rows
        if direct is not None:
            return direct.read(start, stop)
        for shard in range(start // size, -(-stop // size)):
            path = storage.join(self.path, f"{name}/c/{shard}/0")
            if not storage.exists(path):  # which zarr would read as rows without sentences
                raise StoreError(f"{path} is missing", remedy=_DAMAGED)
        with reading_zarr(storage.join(self.path, name)):
            return np.asarray(self.group[name][start:stop])

    def committed(self) -> set[int]:
        """The shards that are done."""
        names = storage.listing(storage.join(self.path, COMMITS))
        return {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()}

    def images_data(self) -> dict[str, str | None]:
        """By finished shard, the digest of the images' shard that it was retrieved for, None where it was not kept.
        Shards whose commit is damaged are left out, as not done."""

        def read(path: str) -> Commit | None:
            with suppress(StoreError, SchemaError):
                return Commit.parse(storage.read_json(path), path)
            return None

        paths = [storage.join(self.path, commit_path(shard)) for shard in sorted(self.committed())]
        return {str(commit.shard): commit.images for commit in reading_ahead(read, paths, self.path) if commit}

    def selection(self) -> Selection:
        """The selection in numbers. Raises StoreError where `retrieve` has not finished."""
        path = storage.join(self.path, HITS_COMMIT)
        if not storage.exists(path):
            raise StoreError(f"{self.path} is unfinished", remedy="run the same dimefm retrieve again")
        return Selection.parse(storage.read_json(path), path)


def retrieve(
    images: Store,
    texts: Store,
    search: Search,
    *,
    index: str,
    index_digest: str,
    top_k: int,
    out: str,
    progress: Callable[[int], None] = lambda rows: None,
) -> Selection:
    """Write the `top_k` sentences of every image to `out`, a shard at a time, and count the hits of each sentence.

    `search` is over `texts`; `index` and `index_digest` are what is written of it. Images without a finite, non-zero
    embedding get no sentence and are counted. Goes on where an earlier run stopped, and does shards again whose images
    were encoded again since. Raises OutputExistsError where `out` holds something else or the texts have changed,
    StoreError where it cannot be written or another process writes to it.
    """
    out = storage.absolute(out)
    schema = PairsStore(
        images=images.path,
        images_identity=images.schema.identity,
        texts=texts.path,
        texts_identity=texts.schema.identity,
        index=index,
        index_digest=index_digest,
        top_k=top_k,
        rows=images.schema.rows,
        text_rows=texts.schema.rows,
        shard_rows=images.schema.shard_rows,
        texts_data=texts.contents.digest,
    )
    with writing(out):
        pairs = _open_or_create(out, schema)
        pending = _pending(pairs, images)
        hits = storage.join(pairs.path, HITS_COMMIT)
        if not pending and storage.exists(hits):
            return pairs.selection()
        storage.remove_leftovers(pairs.path)
        storage.remove_file(hits)  # before what it counts changes
        for shard in range(schema.shards):
            if shard in pending:
                _retrieve_shard(pairs, images, search, shard)
            progress(schema.shard_range(shard)[1])
        return _count_hits(pairs)


def _pending(pairs: Pairs, images: Store) -> set[int]:
    """The shards that are not done, or were done for other embeddings than the images have now."""
    now, done = images.contents.shards, pairs.images_data()
    same = {shard for shard, digest in done.items() if digest in (None, now.get(shard))}
    return {shard for shard in range(pairs.schema.shards) if str(shard) not in same}


def _open_or_create(out: str, schema: PairsStore) -> Pairs:
    attributes = storage.join(out, "zarr.json")
    names = {name for name in storage.listing(out) if not name.endswith(".partial")}  # zarr's, of a killed writer
    strangers = names - {"zarr.json", TEXT_ROW, SCORE, HITS, "commits"}
    if strangers:
        what = f"{out} exists and is not a pseudo-text store (it holds {min(strangers)!r})"
        raise OutputExistsError(what, remedy="give another --out")
    planned = storage.exists(attributes) and ATTRIBUTES_KEY in storage.read_json(attributes).get("attributes", {})
    if not planned:
        with storage.writing_to(out):
            return Pairs.create(out, schema)
    pairs = Pairs(out)
    old, new = pairs.schema, schema
    fields = ["images_identity", "texts_identity", "index_digest", "top_k", "shard_rows"]
    fields += [] if old.texts_data is None else ["texts_data"]
    differences = [f"{n}: {getattr(old, n)} != {getattr(new, n)}" for n in fields if getattr(old, n) != getattr(new, n)]
    if "texts_data" in fields and old.texts_data != new.texts_data:
        what = f"{out} was retrieved from other embeddings of {new.texts} than it has now: {'; '.join(differences)}"
        raise OutputExistsError(what, remedy="give another --out, or delete it: all images must be searched again")
    if differences:
        what = f"{out} exists and differs: {'; '.join(differences)}"
        raise OutputExistsError(what, remedy="give another --out, or delete it")
    return pairs


def _retrieve_shard(pairs: Pairs, images: Store, search: Search, shard: int) -> None:
    began = time.monotonic()
    start, stop = pairs.schema.shard_range(shard)
    status_N = images.status(start, stop)
    valid_N, embedding_ND = valid_rows(images, start, stop)
    good_N = valid_N - start
    unusable_N = status_N == Status.OK
    unusable_N[good_N] = False
    status_N[unusable_N] = Status.NOT_FINITE
    row_NK = np.full((stop - start, pairs.schema.top_k), -1, np.int32)
    score_NK = np.full(row_NK.shape, np.nan, np.float16)
    for at in range(0, len(good_N), search.batch):
        part = slice(at, at + search.batch)
        scores, rows = search.search(embedding_ND[part], pairs.schema.top_k)
        row_NK[good_N[part]], score_NK[good_N[part]] = rows, np.where(rows >= 0, scores, np.nan)
    # What is read of the images is read before: an error of that is none of writing.
    failures, images_digest = _without_embedding(images, shard, status_N), images.contents.shards[str(shard)]
    with storage.writing_to(pairs.path):
        remove_commit(pairs.path, shard)  # of one that is done again
        for name, values in ((TEXT_ROW, row_NK), (SCORE, score_NK)):
            file = f"{name}/c/{shard}/0"
            storage.remove_file(storage.join(pairs.path, file))  # zarr would read what a stopped run left
            array = pairs.group[name].with_config({"write_empty_chunks": True})
            write_rows(pairs.path, file, array, start, values)
        commit = make_commit(
            shard,
            start,
            status_N,
            failures,
            digest=digest_arrays(row_NK, score_NK),
            device=search.device,
            seconds=time.monotonic() - began,
            images=images_digest,
        )
        write_commit(pairs.path, commit)


def _without_embedding(images: Store, shard: int, status_N: np.ndarray[Any, Any]) -> list[Failure]:
    places = np.flatnonzero(status_N != Status.OK)
    if not len(places):
        return []
    rows = images.plan(shard).take(places).select(["row", "key", "file"]).to_pylist()
    names, reason = [Status(code).name for code in status_N[places]], "the image has no embedding"
    return [Failure(**row, status=name, reason=reason) for row, name in zip(rows, names, strict=True)]


def _count_hits(pairs: Pairs) -> Selection:
    schema = pairs.schema
    hits_T = np.zeros(schema.text_rows, np.uint32)
    images, total = 0, 0.0
    for shard in range(schema.shards):
        row_NK = pairs.text_rows(*schema.shard_range(shard))
        used = row_NK[row_NK >= 0]
        hits_T += np.bincount(used, minlength=schema.text_rows).astype(np.uint32)
        images += int((row_NK[:, 0] >= 0).sum())
        total += float(np.nansum(pairs.scores(*schema.shard_range(shard)).astype(np.float64)))
    with storage.writing_to(pairs.path):
        storage.remove_folder(storage.join(pairs.path, f"{HITS}/c"))  # as with the shards
        pairs.group[HITS][:] = hits_T
        storage.flush_tree(storage.join(pairs.path, HITS))
    made_from = pairs.images_data()
    selection = Selection(
        images=images,
        skipped=schema.rows - images,
        selected=int((hits_T > 0).sum()),
        text_rows=schema.text_rows,
        mean_score=round(total / max(1, int(hits_T.sum())), 6),
        digest=digest_arrays(hits_T),
        images_data=None if None in made_from.values() else digest_of(made_from),
    )
    with storage.writing_to(pairs.path):
        require_held(pairs.path)
        storage.write_json(storage.join(pairs.path, HITS_COMMIT), selection.to_json())
    return selection


def require_pairs_match(pairs: Pairs, images: Store, texts: Store) -> None:
    """Raises MismatchError unless `pairs` was retrieved over these two stores, of the embeddings that they have now."""
    for name, mine, store in (
        ("images", pairs.schema.images_identity, images),
        ("texts", pairs.schema.texts_identity, texts),
    ):
        if mine != store.schema.identity:
            what = f"{pairs.path} was retrieved over other {name} than {store.path}"
            raise MismatchError(what, remedy="run dimefm retrieve over these two stores")
    require_same_data(f"{pairs.path} was retrieved", pairs.schema.texts_data, texts, remedy=AGAIN_TEXTS)
    require_same_data(f"{pairs.path} was retrieved", pairs.selection().images_data, images, remedy=AGAIN)
