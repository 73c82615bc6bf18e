"""Pairs, also called pseudo texts: the nearest sentences of every image, and how often each sentence was found.

Shapes: N image rows of a shard, K sentences per image, T sentences.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from cache_schemas import Commit, HitCounts, PairsStore, SchemaError, digest_of
from cache_schemas.embedding_store import COMMITS, commit_path
from cache_schemas.pairs import HITS, HITS_COMMIT, SCORE, TEXT_ROW
from dimefm.errors import MismatchError, StoreError
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
)
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.read_ahead import reading_ahead

_DAMAGED = "delete the folder and retrieve again"
AGAIN = "run the same dimefm retrieve again: it does the shards whose images have changed, and counts the hits again"
AGAIN_TEXTS = "retrieve into another --out, with an index that was brought up to date if there is one"


class Pairs:
    """Pairs on disk."""

    def __init__(self, path: str, *, cached: bool = False) -> None:
        """Open the pairs at `path`; finished ones at a URL may be `cached`, as a Store is. Raises StoreError where
        there are none, SchemaError for attributes that are not valid."""
        self.path = storage.absolute(path)
        self.group: Any = open_group(self.path)
        self.schema = PairsStore.parse(group_attributes(self.group, self.path), storage.join(self.path, "zarr.json"))
        self._arrays = {
            name: StoredArray(
                self.path, name, array_of(self.group, self.path, name), self.schema.shard_rows, _DAMAGED,
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
        create_array(group, HITS, (schema.text_rows,), "uint32", (65536,), 65536)
        require_held(path)
        write_attributes(path, (TEXT_ROW, SCORE, HITS), schema.to_json())
        return Pairs(path)

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
            raise StoreError(f"{storage.join(self.path, HITS)} is damaged: its checksum does not fit", remedy=_DAMAGED)
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
        """The hits in numbers. Raises StoreError where `retrieve` has not finished."""
        path = storage.join(self.path, HITS_COMMIT)
        if not storage.exists(path):
            raise StoreError(f"{self.path} is unfinished", remedy="run the same dimefm retrieve again")
        return HitCounts.parse(storage.read_json(path), path)


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
    require_same_data(f"{pairs.path} was retrieved", pairs.hit_counts().images_data, images, remedy=AGAIN)
