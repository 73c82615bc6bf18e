"""Exact nearest neighbours by blocked matrix products: a search of its own, and the truth an index is measured by.

Shapes: Q queries, N rows of a block, G groups of columns, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dimefm.store import Store

_BLOCK_ROWS = 16384
_QUERIES = 4096  # with a block, 256 MiB of scores
_GROUP = 64
_RESIDENT = 0.7  # of a GPU's free memory


def valid_rows(store: Store, start: int, stop: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of rows start..stop-1 those with a finite embedding that is not zero, as one that failed is: row numbers int64
    (N,), embeddings float16 (N, D)."""
    embedding_ND = store.read(start, stop)
    # Without its sign, a float16 above 0x7bff is infinite or NaN; NumPy's functions for float16 are ten times slower.
    largest_N = (embedding_ND.view(np.uint16) & 0x7FFF).max(axis=1)
    good_N = (largest_N > 0) & (largest_N < 0x7C00)
    if good_N.all():
        return np.arange(start, stop), embedding_ND
    return np.flatnonzero(good_N) + start, embedding_ND[good_N]


class ExactSearch:
    """The rows of a store nearest to a query by inner product. Nothing is built: the rows are read as they are needed,
    or held in a GPU's memory where they fit.

    Products and sums are float32; on a GPU the products are TF32, which holds every float16 exactly.
    """

    batch = 65536  # every row is read once for so many queries

    def __init__(self, store: Store, *, device: str = "cpu", ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Over all rows of the store, or those of some `ranges`, start and stop."""
        self._store, self._device = store, torch.device(device)
        self._ranges = ((0, store.schema.rows),) if ranges is None else ranges
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if store.schema.rows * store.schema.dim * 2 < _RESIDENT * free:
                self._kept = list(self._read())

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows of the store int64 (Q, K), best first; -inf and -1 where there are fewer.

        Queries are taken as float16, like everything in a store. Memory is bounded by one block of scores.
        """
        half_QD = torch.from_numpy(np.ascontiguousarray(queries_QD, np.float16)).to(self._device)
        scores_QK = torch.full((len(half_QD), k), -torch.inf, device=self._device)
        rows_QK = torch.full((len(half_QD), k), -1, dtype=torch.int64, device=self._device)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            for rows_N, embedding_ND in self._read() if self._kept is None else self._kept:
                block_DN = embedding_ND.float().T
                for at in range(0, len(half_QD), _QUERIES):
                    part = slice(at, at + _QUERIES)
                    found_QK, column_QK = _top(half_QD[part].float() @ block_DN, k)
                    both_QK = torch.cat([scores_QK[part], found_QK], dim=1)
                    scores_QK[part], place_QK = both_QK.topk(k, dim=1)
                    rows_QK[part] = torch.cat([rows_QK[part], rows_N[column_QK]], dim=1).gather(1, place_QK)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        return scores_QK.cpu().numpy(), rows_QK.cpu().numpy()

    def _read(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, last in self._ranges:
            for start in range(first, last, _BLOCK_ROWS):
                rows_N, embedding_ND = valid_rows(self._store, start, min(start + _BLOCK_ROWS, last))
                if len(rows_N):
                    yield torch.from_numpy(rows_N).to(self._device), torch.from_numpy(embedding_ND).to(self._device)


def _top(scores_QN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their columns, fewer where there are fewer columns.

    A row's k largest lie in the k groups of columns with the largest maxima: one pass over the scores finds the groups,
    and only these are searched.
    """
    width = scores_QN.shape[1]
    groups = width // _GROUP
    if groups <= k:
        return scores_QN.topk(min(k, width), dim=1)
    whole = groups * _GROUP
    grouped_QGN = scores_QN[:, :whole].unflatten(1, (groups, _GROUP))
    group_QK = grouped_QGN.amax(dim=2).topk(k, dim=1).indices
    few_QN = grouped_QGN.gather(1, group_QK[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    column_QN = (group_QK[:, :, None] * _GROUP + torch.arange(_GROUP, device=group_QK.device)).flatten(1)
    rest = torch.arange(whole, width, device=group_QK.device).expand(len(few_QN), -1)
    few_QN, column_QN = torch.cat([few_QN, scores_QN[:, whole:]], dim=1), torch.cat([column_QN, rest], dim=1)
    found_QK, place_QK = few_QN.topk(k, dim=1)
    return found_QK, column_QN.gather(1, place_QK)
