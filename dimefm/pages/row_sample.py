"""A sample of the rows of a store that a page can afford, whatever the size of the store.

Shapes: N rows of the sample, D embedding width, P principal components.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dimefm.store.embedding_store import Store
from dimefm.store.principal_axes import principal_axes

_SHARDS = 16  # that rows are taken from: of each its plan is read, and a chunk of embeddings


class RowSample(NamedTuple):
    """Rows in ascending order, int64 (N,), and their embeddings, float32 (N, D), of length 1."""

    rows_N: np.ndarray[Any, Any]
    embedding_ND: np.ndarray[Any, Any]


def sample_rows(store: Store, count: int, seed: int = 0) -> RowSample:
    """Up to `count` rows with an embedding, drawn at random from chunks spread evenly over the finished shards."""
    shards = np.array(sorted(store.committed()), np.int64)
    if len(shards) > _SHARDS:
        shards = shards[np.linspace(0, len(shards) - 1, _SHARDS).round().astype(np.int64)]
    rng, rows, embeddings = np.random.default_rng(seed), list[Any](), list[Any]()
    for place, shard in enumerate(shards.tolist()):
        start, stop = store.schema.shard_range(shard)
        share = -(-(count - sum(map(len, rows))) // (len(shards) - place))  # what earlier shards lacked, too
        chunk = max(store.schema.chunk_rows, share)
        at = start + int(rng.integers(0, max(1, stop - start - chunk + 1)))
        found_N, embedding_ND = store.valid_rows(at, min(at + chunk, stop))
        chosen = np.sort(rng.choice(len(found_N), min(share, len(found_N)), replace=False))
        rows.append(found_N[chosen])
        embeddings.append(embedding_ND[chosen].astype(np.float32))
    if not rows:
        return RowSample(np.empty(0, np.int64), np.empty((0, store.schema.dim), np.float32))
    embedding_ND = np.concatenate(embeddings)
    norm_N1 = np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    return RowSample(np.concatenate(rows), embedding_ND / norm_N1)


def principal_components(embedding_ND: np.ndarray[Any, Any], count: int = 2) -> np.ndarray[Any, Any]:
    """The places of rows along the directions in which they differ most, float32 (N, P) (principal component
    analysis)."""
    return principal_axes(embedding_ND, count).place(embedding_ND)
