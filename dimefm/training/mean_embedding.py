"""The teacher's mean embedding, which the centred loss takes off both sides.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import numpy as np
import torch

from dimefm.store.embedding_store import Store
from dimefm.store.joined_store import JoinedStore

_MOST_ROWS = 65536


def mean_embedding(store: Store) -> torch.Tensor:
    """The mean of a store's embeddings, float32 (D,). In a store of more than 65,536 rows it is taken over that many,
    in chunks spread evenly over the store: a chunk is read as a whole to be checked. Of several stores it is the mean
    of what is drawn."""
    if isinstance(store, JoinedStore):
        means = [mean_embedding(part) * share for part, share in zip(store.parts, store.shares.tolist(), strict=True)]
        return torch.stack(means).sum(dim=0)
    rows, size = store.schema.rows, store.schema.chunk_rows
    chunks = np.arange(-(-rows // size))
    if rows > _MOST_ROWS:
        chunks = np.linspace(0, len(chunks) - 1, max(1, _MOST_ROWS // size)).astype(np.int64)
    spans = [store.read(at, min(at + size, rows)) for at in (chunks * size).tolist()]
    embedding_ND = torch.from_numpy(np.concatenate(spans)).double()
    good_N = embedding_ND.any(dim=1) & embedding_ND.isfinite().all(dim=1)
    return embedding_ND[good_N].mean(dim=0).float()
