"""Exact nearest neighbours by matrix products of blocks: a search of its own, and the truth for measuring recall.

Shapes: Q queries, N rows of a block, G groups of columns, D width, K neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from dimefm.store.embedding_store import Store
from dimefm.system.matrix_products import tf32
from dimefm.system.transfer import Transfer, fetch


class Search(Protocol):
    """Finds the nearest rows of a store: `ExactSearch`, or `retrieval.index_search.IndexSearch`.

    It is fastest with `batch` queries at once; `device` is what computes.
    """

    batch: int
    device: str

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows int64 (Q, K), best first; -1 where there are fewer."""

    def of_kind(self, kind: str) -> Search:
        """The same search, set for queries that are embeddings of an "image" or of a "text"."""


_BLOCK_ROWS = 16384
_QUERIES = 4096  # with a block, 256 MiB of scores
# On a GPU wider blocks: 25 launches and three top-k follow each product, which cost about the same however wide it is,
# by estimate more than the product at 16,384 rows and a quarter of it at 131,072. The scores are 2 GiB, or an eighth of
# the free memory where that is less.
_GPU_BLOCK_ROWS, _GPU_QUERIES, _GPU_SCORES = 131_072, 4096, 1 / 8
_GROUP = 64
_RESIDENT = 0.7  # of a GPU's free memory
# Products of halves whose sums are float32 and stay so: since torch 2.8, on GPUs alone.
_MIXED = "dtype" in torch.ops.aten.mm.overloads()


class ExactSearch:
    """Finds the rows of a store nearest to a query by inner product. Nothing is built: the rows are read as they are
    needed, or kept in a GPU's memory where they fit.

    Products and sums are float32. On a GPU a float16 store and float16 queries are multiplied as float16, which is
    exact too and twice as fast as TF32; before torch 2.8 as TF32, which holds every float16 exactly.
    """

    batch = 65536  # queries for which each row is read only once

    def __init__(
        self,
        store: Store,
        *,
        device: str = "cpu",
        ranges: Sequence[tuple[int, int]] | None = None,
        keep: bool = False,
    ) -> None:
        """Search all rows of the store, or those of `ranges`, each a start and a stop. With `keep` they are read now
        and kept in memory as float32: a query alone is then answered in a tenth of the time."""
        self._store, self.device, self._device = store, device, torch.device(device)
        self._ranges = ((0, store.schema.rows),) if ranges is None else ranges
        self._transfer = Transfer(self._device)
        self._block_rows, self._queries = _BLOCK_ROWS, _QUERIES
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            self._block_rows = _GPU_BLOCK_ROWS
            self._queries = max(1, min(_GPU_QUERIES, int(_GPU_SCORES * free) // (4 * self._block_rows)))
            rows = sum(stop - start for start, stop in self._ranges)
            if rows * store.schema.dim * store.schema.item_bytes < _RESIDENT * free:
                self._kept = list(self._blocks())
        elif keep:
            self._kept = [(rows_N, embedding_ND.float()) for rows_N, embedding_ND in self._blocks()]

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows of the store int64 (Q, K), best first; -inf and -1 where there are fewer.

        Queries of any type give the same result as in float32. Memory is bounded by one block of scores.
        """
        with np.errstate(over="ignore"):
            half_QD = queries_QD.astype(np.float16, copy=False)
        # Queries that float16 holds exactly are multiplied as float16, which is faster on a GPU.
        as_half = half_QD is queries_QD or np.array_equal(half_QD, queries_QD)
        query_QD = np.ascontiguousarray(half_QD if as_half else queries_QD.astype(np.float32, copy=False))
        scores_QK, rows_QK = self._search(torch.from_numpy(query_QD).to(self._device), k)
        return scores_QK.cpu().numpy(), rows_QK.cpu().numpy()

    def of_kind(self, kind: str) -> ExactSearch:
        """Itself: it is exact for all."""
        return self

    def _search(self, query_QD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`search` on the device. The CPU waits for it only where it is more than one block behind."""
        scores_QK = torch.full((len(query_QD), k), -torch.inf, device=self._device)
        rows_QK = torch.full((len(query_QD), k), -1, dtype=torch.int64, device=self._device)
        behind = deque([fetch(scores_QK[:1])])
        halves = query_QD.dtype == torch.float16 and self._store.schema.dtype == "float16"
        factor = _as_they_are if halves and _MIXED and query_QD.is_cuda else torch.Tensor.float
        with tf32(self._device) if halves and not _MIXED else nullcontext():
            for rows_N, embedding_ND in self._blocks() if self._kept is None else self._kept:
                block_DN = factor(embedding_ND).T
                for at in range(0, len(query_QD), self._queries):
                    part = slice(at, at + self._queries)
                    found_QK, column_QK = _top(_product(factor(query_QD[part]), block_DN), k)
                    both_QK = torch.cat([scores_QK[part], found_QK], dim=1)
                    scores_QK[part], place_QK = both_QK.topk(k, dim=1)
                    rows_QK[part] = torch.cat([rows_QK[part], rows_N[column_QK]], dim=1).gather(1, place_QK)
                behind.append(fetch(scores_QK[:1]))
                behind.popleft().wait()  # or blocks waiting for their turn would fill the GPU's memory
        return scores_QK, rows_QK

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Row numbers (N,) and embeddings (N, D) of each block of rows, on the device. A thread reads the next block
        while one is worked on."""
        places = [
            (start, min(start + self._block_rows, last))
            for first, last in self._ranges
            for start in range(first, last, self._block_rows)
        ]
        with ThreadPoolExecutor(1) as reader:
            reads = (reader.submit(self._read, start, stop) for start, stop in places)
            following = next(reads, None)
            while following is not None:
                present, following = following, next(reads, None)
                rows_N, embedding_ND = present.result()
                if len(rows_N):
                    yield self._transfer.send(rows_N), self._transfer.send(embedding_ND)

    def _read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows_N, embedding_ND = map(torch.from_numpy, self._store.valid_rows(start, stop))
        if self._device.type == "cuda":  # page-locked memory is copied while the GPU computes
            return rows_N.pin_memory(), embedding_ND.pin_memory()
        return rows_N, embedding_ND


def block_top(queries_QD: torch.Tensor, block_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ExactSearch` does with each block on a CPU: scores (Q, K) and places in the block (Q, K)."""
    return _top(_product(queries_QD, block_ND.T), k)


def _as_they_are(half: torch.Tensor) -> torch.Tensor:
    return half


def _product(queries_QD: torch.Tensor, block_DN: torch.Tensor) -> torch.Tensor:
    """Inner products, float32 (Q, N), of two float32 matrices, or on a GPU of two float16 ones."""
    if queries_QD.dtype == torch.float16:
        return torch.mm(queries_QD, block_DN, out_dtype=torch.float32)
    return queries_QD @ block_DN


def _top(scores_QN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each row and their columns; fewer where there are fewer columns.

    The k largest of a row lie in the k groups of columns with the largest maxima: one pass over the scores finds these
    groups, and only they are searched, with the columns after the last whole group.
    """
    width = scores_QN.shape[1]
    groups = width // _GROUP
    if groups <= k:
        return scores_QN.topk(min(k, width), dim=1)
    whole = groups * _GROUP
    grouped_QGN = scores_QN[:, :whole].unflatten(1, (groups, _GROUP))
    group_QK = grouped_QGN.amax(dim=2).topk(k, dim=1).indices
    few_QN = grouped_QGN.gather(1, group_QK[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    found_QK, place_QK = torch.cat([few_QN, scores_QN[:, whole:]], dim=1).topk(k, dim=1)
    number_QK, within_QK = place_QK // _GROUP, place_QK % _GROUP
    inside_QK = group_QK.gather(1, number_QK.clamp(max=k - 1)) * _GROUP + within_QK
    return found_QK, torch.where(number_QK < k, inside_QK, place_QK + (whole - k * _GROUP))
