"""Columns of a Parquet export beside the vectors: what pairs say, clusters, places on a map, thumbnails.

    score      float32   cosine of the nearest sentence of an image; null where it has none
    hits       uint32    how many images have a sentence among their top k
    cluster    int32     the nearest of the centres of k-means
    x, y       float32   the two principal components
    thumbnail  struct<bytes: binary, path: string>, as Hugging Face's datasets has images; null where there is none

Centres and components are found once, from a random sample of rows, and sent to all workers. Shapes: N rows, K
clusters, D width, S sampled rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dimefm.caching.thumbnails import thumbnails
from dimefm.errors import DimefmError, MismatchError
from dimefm.selection.members import read_rows
from dimefm.store.embedding_store import Store, require_same_data
from dimefm.store.pairs_store import Pairs
from dimefm.store.principal_axes import PrincipalAxes, principal_axes
from dimefm.system.machine import choose_device
from dimefm.system.notes import note

_SAMPLE = 65_536  # rows
_PER_CLUSTER = 64
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Add = Callable[[pa.Table, np.ndarray[Any, Any], Counter[str]], pa.Table]
"""Adds the columns to a table of these rows, and counts why pictures are missing."""


@dataclass(frozen=True)
class MoreColumns:
    """What is to be added, as it is sent to workers."""

    pairs: str | None
    centre_KD: np.ndarray[Any, Any] | None
    axes: PrincipalAxes | None
    side: int | None

    def open(self, store: Store) -> Add:
        """What adds the columns to tables of rows of this store."""
        pairs = Pairs(self.pairs) if self.pairs else None
        hits_T = pairs.hits() if pairs and store.schema.kind == "text" else None

        def add(table: pa.Table, rows_N: np.ndarray[Any, Any], lacking: Counter[str]) -> pa.Table:
            first, last = int(rows_N[0]), int(rows_N[-1]) + 1
            if hits_T is not None:
                table = table.append_column("hits", pa.array(hits_T[rows_N]))
            elif pairs:
                score_N = pairs.scores(first, last)[rows_N - first, 0].astype(np.float32)
                table = table.append_column("score", pa.array(score_N, from_pandas=True))  # NaN: none
            if self.centre_KD is not None or self.axes is not None:
                vector_ND = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows_N), -1)
            if self.centre_KD is not None:
                nearest_N = (vector_ND @ self.centre_KD.T).argmax(axis=1)
                table = table.append_column("cluster", pa.array(nearest_N.astype(np.int32)))
            if self.axes is not None:
                for name, place_N in zip("xy", self.axes.place(vector_ND).T, strict=True):
                    table = table.append_column(name, pa.array(np.ascontiguousarray(place_N)))
            if self.side:
                table = table.append_column("thumbnail", _pictures(store, rows_N, self.side, lacking))
            return table

        return add


def more_columns(
    store: Store, *, pairs: str | None, clusters: int | None, map_: bool, thumbnails: int | None
) -> MoreColumns:
    """Look at what is asked for and find centres and components. Raises MismatchError for pairs of other stores and for
    thumbnails of sentences, StoreError for unfinished pairs, DimefmError for more clusters than rows."""
    if thumbnails and store.schema.kind == "text":
        what = f"--thumbnails: {store.path} holds text embeddings, of which there are no pictures"
        raise MismatchError(what, remedy="leave it out, or give a store of images")
    if pairs:
        _require_pairs(Pairs(pairs), store)
    if not clusters and not map_:
        return MoreColumns(pairs, None, None, thumbnails)
    note("looking at a sample of the rows ...")
    sample_SD = _sample(store, max(_SAMPLE, _PER_CLUSTER * (clusters or 0)))
    if clusters and clusters > len(sample_SD):
        what = f"--clusters {clusters:,}: {store.path} has {len(sample_SD):,} rows with an embedding"
        raise DimefmError(what, remedy="give a smaller number, such as the square root of that")
    axes = principal_axes(sample_SD[:: -(-len(sample_SD) // _SAMPLE)]) if map_ else None
    return MoreColumns(pairs, _centres(sample_SD, clusters) if clusters else None, axes, thumbnails)


def _require_pairs(pairs: Pairs, store: Store) -> None:
    """Raises MismatchError unless pairs were made for this store and the embeddings that it has now, StoreError where
    they are unfinished."""
    schema, images = pairs.schema, store.schema.kind == "image"
    data = pairs.hit_counts().images_data if images else schema.texts_data
    if store.schema.identity != (schema.images_identity if images else schema.texts_identity):
        what = f"{pairs.path} was made for another store of {store.schema.kind}s than {store.path}"
        raise MismatchError(what, remedy="give the pairs that dimefm retrieve made of this store")
    require_same_data(f"{pairs.path} was made", data, store, remedy="run the same dimefm retrieve again")


def _sample(store: Store, count: int) -> np.ndarray[Any, Any]:
    """Embeddings of up to `count` random rows, of those that have one, in the store's type (S, D)."""
    rows = store.schema.rows
    chosen_S = np.arange(rows) if rows <= count else np.random.default_rng(0).choice(rows, count, replace=False)
    sample_SD = read_rows(store, np.sort(chosen_S))
    return sample_SD[sample_SD.any(axis=1)]


def _centres(sample_SD: np.ndarray[Any, Any], clusters: int) -> np.ndarray[Any, Any]:
    import torch

    from dimefm.selection.clusters import spherical_kmeans

    device = choose_device(None)
    found: np.ndarray[Any, Any] = spherical_kmeans(torch.from_numpy(sample_SD), clusters, device=device).cpu().numpy()
    return found


def _pictures(store: Store, rows_N: np.ndarray[Any, Any], side: int, lacking: Counter[str]) -> pa.Array:
    found: list[dict[str, Any] | None] = []
    for one in thumbnails(store, rows_N, side):
        if isinstance(one, str):
            lacking[one] += 1
        found.append(None if isinstance(one, str) else {"bytes": one, "path": None})
    return pa.array(found, IMAGE)
