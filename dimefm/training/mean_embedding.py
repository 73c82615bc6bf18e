"""The teacher's mean embedding, which the centred loss takes off both sides.

Shapes: N rows that are drawn, D embedding width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dimefm.store.embedding_store import Store
from dimefm.store.joined_store import JoinedStore

_MOST_ROWS, _MOST_READ = 65536, 1 << 20
_Array = np.ndarray[Any, Any]


def mean_embedding(store: Store, only: _Array | None = None) -> torch.Tensor:
    """The mean of a store's embeddings, or of those of the rows `only`, ascending; float32 (D,). Of several stores it
    is the mean of what is drawn.

    Of more than 65,536 rows it is taken over about that many, in chunks spread evenly over those that have some: a
    chunk is read as a whole to be checked. Where few rows of a chunk are drawn, these are fewer: no more than a million
    rows are read.
    """
    if isinstance(store, JoinedStore):
        assert only is None
        means = [mean_embedding(part) * share for part, share in zip(store.parts, store.shares.tolist(), strict=True)]
        return torch.stack(means).sum(dim=0)
    rows, size = store.schema.rows, store.schema.chunk_rows
    chunks, most = np.arange(-(-rows // size)), _MOST_ROWS // size if rows > _MOST_ROWS else rows
    if only is not None:
        chunks = np.unique(only // size)
        most = len(chunks) * _MOST_ROWS // len(only) if len(only) > _MOST_ROWS else rows
        most = min(most, _MOST_READ // size)
    if len(chunks) > most:
        chunks = chunks[np.linspace(0, len(chunks) - 1, max(1, most)).astype(np.int64)]
    spans = [_span(store, at, min(at + size, rows), only) for at in (chunks * size).tolist()]
    embedding_ND = torch.from_numpy(np.concatenate(spans)).double()
    good_N = embedding_ND.any(dim=1) & embedding_ND.isfinite().all(dim=1)
    return embedding_ND[good_N].mean(dim=0).float()


def _span(store: Store, start: int, stop: int, only: _Array | None) -> _Array:
    embedding_ND = store.read(start, stop)
    if only is None:
        return embedding_ND
    found: _Array = embedding_ND[only[slice(*np.searchsorted(only, (start, stop)))] - start]
    return found
