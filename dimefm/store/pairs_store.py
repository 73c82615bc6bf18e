"""Pairs, also called pseudo texts: the nearest sentences of every image, and how often each sentence was found.

Shapes: N image rows of a shard, K sentences per image, T sentences.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

import numpy as np

from cache_schemas import Commit, Failure, HitCounts, PairsStore, SchemaError, Status, digest_of
from cache_schemas.embedding_store import COMMITS, commit_path, failures_path
from cache_schemas.pairs import HITS, HITS_COMMIT, SCORE, TEXT_ROW
from dimefm.errors import MismatchError, StoreError
from dimefm.store.commit import make_commit, remove_commit, write_commit
from dimefm.store.embedding_store import Store, require_same_data
from dimefm.store.stored_array import StoredArray
from dimefm.store.zarr_arrays import (
    array_of,
    create_array,
    digest_arrays,
    group_attributes,
    new_group,
    open_group,
    reading_zarr,
    write_attributes,
    write_rows,
)
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.read_ahead import reading_ahead

HITS_ROWS = 65536  # of a shard of hits
_DAMAGED = "delete the folder and retrieve again"
_DAMAGED_CAPTIONS = "delete the folder and run the same cache-images again"
AGAIN = "run the same dimefm retrieve again: it does the shards whose images have changed, and counts the hits again"
AGAIN_CAPTIONS = "run the same dimefm cache-images again: it does what has changed"
_AGAIN_OVER_BOTH = "run dimefm retrieve over these two stores"
AGAIN_TEXTS = "retrieve into another --out, with an index that was brought up to date if there is one"


def pairs_schema(
    images: Store,
    texts: Store,
    *,
    index: str,
    index_digest: str,
    top_k: int,
    kind: Literal["retrieved", "captions"] = "retrieved",
) -> PairsStore:
    """The document of pairs of the images and texts that are in two finished stores now."""
    return PairsStore(
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
        kind=kind,
    )


class Pairs:
    """Pairs on disk."""

    def __init__(self, path: str, *, cached: bool = False) -> None:
        """Open the pairs at `path`; finished ones at a URL may be `cached`, as a Store is. Raises StoreError where
        there are none, SchemaError for attributes that are not valid."""
        self.path = storage.absolute(path)
        self.group: Any = open_group(self.path)
        self.schema = PairsStore.parse(group_attributes(self.group, self.path), storage.join(self.path, "zarr.json"))
        self._damaged = _DAMAGED_CAPTIONS if self.schema.kind == "captions" else _DAMAGED
        self._arrays = {
            name: StoredArray(
                self.path, name, array_of(self.group, self.path, name), self.schema.shard_rows, self._damaged,
                version=self._version if cached else None,
            )
            for name in (TEXT_ROW, SCORE)
        }  # fmt: skip

    def __reduce__(self) -> tuple[type[Pairs], tuple[str]]:
        return Pairs, (self.path,)  # another process opens it again

    @staticmethod
    def create(path: str, schema: PairsStore) -> Pairs:
        """Make the arrays, then the attributes."""
        path = storage.absolute(path)
        group = new_group(path)
        shape, chunk = (schema.rows, schema.top_k), (min(schema.shard_rows, 1024), schema.top_k)
        create_array(group, TEXT_ROW, shape, "int32", chunk, schema.shard_rows)
        create_array(group, SCORE, shape, "float16", chunk, schema.shard_rows, fill=float("nan"))
        create_array(group, HITS, (schema.text_rows,), "uint32", (HITS_ROWS,), HITS_ROWS)
        require_held(path)
        write_attributes(path, (TEXT_ROW, SCORE, HITS), schema.to_json())
        return Pairs(path)

    # -- writing ------------------------------------------------------------------------------------------------------

    def pending(self, images: Store) -> dict[int, str]:
        """The shards that are not done, or were done for other embeddings than the images have now; with the digests of
        these."""
        now = images.contents.shards
        current = {shard for shard, digest in self.images_data().items() if digest in (None, now.get(shard))}
        return {shard: now[str(shard)] for shard in range(self.schema.shards) if str(shard) not in current}

    def write_shard(
        self,
        shard: int,
        images: Store,
        status_N: np.ndarray[Any, Any],
        row_NK: np.ndarray[Any, Any],
        score_NK: np.ndarray[Any, Any],
        *,
        device: str,
        seconds: float,
        digest: str,
    ) -> None:
        """Write and commit one shard. `status_N` are those of its images, of which only OK ones may have sentences;
        `digest` is that of their embeddings. Raises StoreError where it cannot be written."""
        commit = make_commit(
            shard,
            self.schema.shard_range(shard)[0],
            status_N,
            _without_embedding(images, shard, status_N),
            digest=digest_arrays(row_NK, score_NK),
            device=device,
            seconds=seconds,
            images=digest,
        )
        with storage.writing_to(self.path):
            remove_commit(self.path, shard)  # where a shard is done again
            for name, values in ((TEXT_ROW, row_NK), (SCORE, score_NK)):
                file = f"{name}/c/{shard}/0"
                storage.remove_file(storage.join(self.path, file))  # zarr would read what a stopped run left
                array = self.group[name].with_config({"write_empty_chunks": True})
                write_rows(self.path, file, array, commit.start, values)
            write_commit(self.path, commit)

    # -- reading ------------------------------------------------------------------------------------------------------

    def text_rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """For each image the rows of its sentences in the text store, best first, int32 (N, K); -1 for none."""
        return self._arrays[TEXT_ROW].read(slice(start, stop))

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`text_rows` of any image rows in any order, int32 (N, K)."""
        return self._arrays[TEXT_ROW].read(rows_N)

    def fetch(self, rows_N: np.ndarray[Any, Any]) -> None:
        """As Store.fetch, the sentences of images."""
        self._arrays[TEXT_ROW].fetch(rows_N)

    @cached_property
    def _data(self) -> str:
        """What is in all shards, for a cache of them."""
        return digest_of(self.hit_counts().to_json())

    def _version(self, shard: int) -> str:
        return self._data

    @property
    def by_chunks(self) -> bool:
        """As Store.by_chunks, of the sentences of images."""
        return self._arrays[TEXT_ROW].by_chunks

    def scores(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Cosine similarities, float16 (N, K)."""
        return self._arrays[SCORE].read(slice(start, stop))

    def shard_arrays(self, shard: int) -> dict[str, np.ndarray[Any, Any]]:
        """Rows and scores of one shard by name, every checksum compared."""
        rows = slice(*self.schema.shard_range(shard))
        return {name: array.read_by_zarr(rows) for name, array in self._arrays.items()}

    def commit(self, shard: int) -> Commit | None:
        """The commit of a shard, None where it is not done. Raises SchemaError, StoreError for a damaged one."""
        path = storage.join(self.path, commit_path(shard))
        return Commit.parse(storage.read_json(path), path) if storage.exists(path) else None

    def files(self) -> set[str]:
        """The files that finished pairs may have, as paths within them."""
        found = {"zarr.json", HITS_COMMIT, *(f"{name}/zarr.json" for name in (*self._arrays, HITS))}
        found |= {f"{HITS}/c/{part}" for part in range(-(-self.schema.text_rows // HITS_ROWS))}
        for shard in range(self.schema.shards):
            found |= {array.file(shard) for array in self._arrays.values()}
            found |= {commit_path(shard), failures_path(shard)}
        return found

    def hits(self) -> np.ndarray[Any, Any]:
        """By sentence, how many images have it among their top k, uint32 (T,). Raises StoreError if unfinished, or
        damaged."""
        expected = self.hit_counts().digest
        try:
            with reading_zarr(storage.join(self.path, HITS)):
                hits_T = np.asarray(self.group[HITS][:])
        except ValueError:  # a checksum
            hits_T = np.empty(0, np.uint32)
        if digest_arrays(hits_T) != expected:
            what = f"{storage.join(self.path, HITS)} is damaged: its checksum does not fit"
            raise StoreError(what, remedy=self._damaged)
        return hits_T

    def committed(self) -> set[int]:
        """The shards that are done."""
        names = storage.listing(storage.join(self.path, COMMITS))
        return {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()}

    def images_data(self) -> dict[str, str | None]:
        """By finished shard, the digest of the images' shard that it was retrieved for; None where it was not recorded.
        A shard whose commit is damaged counts as not done, and is left out."""

        def read(path: str) -> Commit | None:
            with suppress(StoreError, SchemaError):
                return Commit.parse(storage.read_json(path), path)
            return None

        paths = [storage.join(self.path, commit_path(shard)) for shard in sorted(self.committed())]
        return {str(commit.shard): commit.images for commit in reading_ahead(read, paths, self.path) if commit}

    def hit_counts(self) -> HitCounts:
        """The hits in numbers. Raises StoreError where these pairs are unfinished."""
        path = storage.join(self.path, HITS_COMMIT)
        if not storage.exists(path):
            command = "cache-images" if self.schema.kind == "captions" else "retrieve"
            raise StoreError(f"{self.path} is unfinished", remedy=f"run the same dimefm {command} again")
        return HitCounts.parse(storage.read_json(path), path)


def _without_embedding(images: Store, shard: int, status_N: np.ndarray[Any, Any]) -> list[Failure]:
    """The images of a shard that get no sentence, as failures of its commit."""
    places = np.flatnonzero(status_N != Status.OK)
    if not len(places):
        return []
    rows = images.plan(shard).take(places).select(["row", "key", "file"]).to_pylist()
    names, reason = [Status(code).name for code in status_N[places]], "the image has no embedding"
    return [Failure(**row, status=name, reason=reason) for row, name in zip(rows, names, strict=True)]


def require_pairs_match(pairs: Pairs, images: Store, texts: Store) -> None:
    """Raises MismatchError unless `pairs` were made for these two stores, and the embeddings that they have now."""
    captions = pairs.schema.kind == "captions"
    made = f"{pairs.path} was {'made' if captions else 'retrieved'}"
    for name, mine, store in (
        ("images", pairs.schema.images_identity, images),
        ("texts", pairs.schema.texts_identity, texts),
    ):
        if mine != store.schema.identity:
            what = f"{made} over other {name} than {store.path}"
            remedy = "give the captions that were cached with these images" if captions else _AGAIN_OVER_BOTH
            raise MismatchError(what, remedy=remedy)
    again, again_texts = (AGAIN_CAPTIONS, AGAIN_CAPTIONS) if captions else (AGAIN, AGAIN_TEXTS)
    require_same_data(made, pairs.schema.texts_data, texts, remedy=again_texts)
    require_same_data(made, pairs.hit_counts().images_data, images, remedy=again)
