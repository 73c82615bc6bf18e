"""Exact nearest neighbours by blocked matrix products: the truth that an index is measured against.

Shapes: Q queries, N rows of a block, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cache_schemas import Status
from dimefm.store import Store

_BLOCK_ROWS = 65536


def valid_blocks(store: Store) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The rows of a store that have a finite embedding, in order: row numbers int64 (N,), embeddings float32 (N, D)."""
    for start in range(0, store.schema.rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, store.schema.rows)
        embedding_ND = store.read(start, stop).astype(np.float32)
        good_N = (store.status(start, stop) == Status.OK) & np.isfinite(embedding_ND).all(axis=1)
        good_N &= (embedding_ND != 0).any(axis=1)
        yield np.flatnonzero(good_N) + start, embedding_ND[good_N]


def exact_search(
    store: Store, queries_QD: np.ndarray[Any, Any], k: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k rows of largest inner product for each query: scores float32 (Q, K), rows int64 (Q, K), best first.

    Memory is bounded by one block of the store, whatever its size. Fewer than k rows in the store: -1 and -inf.
    """
    queries = torch.from_numpy(np.ascontiguousarray(queries_QD, dtype=np.float32))
    best_QK = torch.full((len(queries), k), -torch.inf)
    rows_QK = torch.full((len(queries), k), -1, dtype=torch.int64)
    for rows_N, embedding_ND in valid_blocks(store):
        scores_QN = queries @ torch.from_numpy(embedding_ND).T
        scores_QN, column_QN = scores_QN.topk(min(k, len(rows_N)), dim=1)
        all_scores = torch.cat([best_QK, scores_QN], dim=1)
        all_rows = torch.cat([rows_QK, torch.from_numpy(rows_N)[column_QN]], dim=1)
        best_QK, keep_QK = all_scores.topk(k, dim=1)
        rows_QK = all_rows.gather(1, keep_QK)
    return best_QK.numpy(), rows_QK.numpy()
