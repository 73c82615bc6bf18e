"""Search in an index that `retrieval.index_build` published: FAISS finds candidates, the store scores them again.

Shapes: Q queries, N distinct candidates, D width, L lists, P lists probed, C candidates, K neighbours.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schemas import IndexSidecar
from dimefm.errors import StoreError
from dimefm.retrieval.faiss_index import FaissIndex, inner_products
from dimefm.retrieval.index_sidecar import REBUILD, read_sidecar, require_index_of, require_size, store_of
from dimefm.store.embedding_store import Store
from dimefm.system import storage

_CHOICE_QUERIES = 1024  # whose products with all centroids are in memory at once
_RESCORE_QUERIES, _RESCORE_JOBS = 1024, 4  # queries share candidates, each of which is read once
_RESCORE_BYTES = 128 * 1024**2  # of candidates in float32, for each job


@dataclass(frozen=True)
class SearchParameters:
    """How many lists are probed (0: there are no lists), and how many times k candidates are scored again (1: none,
    the index's own scores are taken)."""

    probes: int
    rescore: int


class IndexSearch:
    """The rows of a store nearest to a query, by an index over it: a `retrieval.exact_search.Search`."""

    batch = 4096
    device = "cpu"

    def __init__(
        self, index: FaissIndex, store: Store, parameters: SearchParameters, sidecar: IndexSidecar | None = None
    ) -> None:
        self._index, self._store, self._parameters, self._sidecar = index, store, parameters, sidecar
        self._lists = _ListChoice(index) if index.spread else None

    @staticmethod
    def open(path: str, store: Store | None = None) -> IndexSearch:
        """Open an index for its first kind of query; its store is `store`, or else the one that its sidecar names.

        Raises StoreError where it is missing, damaged or lacks rows of the store, SchemaError where its sidecar is not
        valid, MismatchError where it is over another store.
        """
        folder = storage.local(path, "an index")
        sidecar = read_sidecar(folder)
        store = store or store_of(folder, sidecar)
        require_index_of(path, sidecar, store)
        first = _parameters(sidecar, sidecar.recall[0].source)
        return IndexSearch(read_index(folder, sidecar), store, first, sidecar)

    def of_kind(self, kind: str) -> IndexSearch:
        """The same index, with the parameters that were tuned for queries of this kind."""
        if self._sidecar is None:
            return self
        other = copy(self)
        other._parameters = _parameters(self._sidecar, kind)
        return other

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows of the store int64 (Q, K), best first; -1 where fewer than k were found.

        It is fastest with a thousand queries or more at once.
        """
        return self.search_with(self._parameters, queries_QD, k)

    def probes(self) -> Sequence[int]:
        """Numbers of lists worth trying, ascending: powers of two and those halfway between; (0,) without lists."""
        lists = self._index.lists
        if not lists:
            return (0,)
        powers = [1 << power for power in range(int(math.log2(lists)) + 1)]
        halfway = [3 * power // 2 for power in powers]
        return sorted({lists, *(count for count in (*powers, *halfway) if count <= lists)})

    def search_with(
        self, parameters: SearchParameters, queries_QD: np.ndarray[Any, Any], k: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """`search` with other parameters than those the index was opened with."""
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        count = min(k * parameters.rescore, max(k, self._index.rows))
        scores_QC, rows_QC = self._candidates(queries_QD, count, parameters.probes)
        if parameters.rescore == 1:
            return scores_QC, rows_QC

        def rescore(part: slice) -> tuple[Any, Any]:
            return _rescored(self._store, queries_QD[part], rows_QC[part], k)

        parts = [slice(at, at + _RESCORE_QUERIES) for at in range(0, len(rows_QC), _RESCORE_QUERIES)]
        with ThreadPoolExecutor(min(_RESCORE_JOBS, torch.get_num_threads())) as pool:
            return _joined(pool.map(rescore, parts))

    def _candidates(self, queries_QD: np.ndarray[Any, Any], count: int, probes: int) -> tuple[Any, Any]:
        """The best rows of each query by the index's own scores: scores and rows (Q, C)."""
        if self._lists is None:
            return self._index.search(queries_QD, count, probes)
        found = []
        for at in range(0, len(queries_QD), _CHOICE_QUERIES):
            part_QD = queries_QD[at : at + _CHOICE_QUERIES]
            list_QP, near_QP = self._lists.choose(part_QD, probes)
            found.append(self._index.search_lists(part_QD, count, list_QP, near_QP))
        return _joined(found)


def _parameters(sidecar: IndexSidecar, kind: str) -> SearchParameters:
    tuned = sidecar.search_of(kind)
    return SearchParameters((tuned.search_parameters or {}).get("nprobe", 0), tuned.rescore or 1)


class _ListChoice:
    """Chooses the lists to probe: those whose best row is expected to score highest.

    A list's best row is expected to score by a bonus more than its centroid. A list of n rows, of standard deviation s
    about its centroid, projected on a query: the expected maximum of n normal values, s sqrt(2 ln n / D). Without the
    bonus tight lists are probed before wide ones that hold better rows, the more so the further the queries are from
    all rows, as images are from sentences.
    """

    def __init__(self, index: FaissIndex) -> None:
        spread_L = np.frombuffer(base64.b64decode(index.spread), np.float16).astype(np.float32)
        centroid_LD = index.centroids()
        log_L = 2 * np.log(np.maximum(index.list_sizes(), 2)) / centroid_LD.shape[1]
        self._centroid_LD = torch.from_numpy(centroid_LD)
        self._bonus_L = torch.from_numpy(spread_L * np.sqrt(log_L).astype(np.float32))

    def choose(self, queries_QD: np.ndarray[Any, Any], probes: int) -> tuple[Any, Any]:
        """The lists for each query, int64 (Q, P), and the query's inner products with their centroids, float32."""
        near_QL = torch.from_numpy(queries_QD) @ self._centroid_LD.T
        list_QP = (near_QL + self._bonus_L).topk(probes, dim=1).indices
        return list_QP.numpy(), near_QL.gather(1, list_QP).numpy()


def _rescored(
    store: Store, queries_QD: np.ndarray[Any, Any], candidate_QC: np.ndarray[Any, Any], k: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k best of each query's candidates, by the inner product with their rows of the store: scores and rows (Q, K).

    A row that several queries have as a candidate is read once. Where the rows would take more than _RESCORE_BYTES, the
    queries are halved. A candidate of -1 stands for none.
    """
    row_N, place_QC = np.unique(candidate_QC, return_inverse=True)
    queries, width = queries_QD.shape
    if len(row_N) * width * 4 > _RESCORE_BYTES and queries > 1:
        halves = (slice(0, queries // 2), slice(queries // 2, queries))
        return _joined(_rescored(store, queries_QD[half], candidate_QC[half], k) for half in halves)
    embedding_ND = torch.from_numpy(store.gather(np.maximum(row_N, 0))).float().numpy()
    scores_QC = inner_products(queries_QD, embedding_ND, place_QC.reshape(candidate_QC.shape))
    scores_QC[candidate_QC < 0] = -np.inf
    best_QK, place_QK = torch.from_numpy(scores_QC).topk(min(k, candidate_QC.shape[1]), dim=1)
    return best_QK.numpy(), np.take_along_axis(candidate_QC, place_QK.numpy(), axis=1)


def _joined(
    parts: Iterable[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores and rows of parts of the queries, put together."""
    scores, rows = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


def read_index(folder: str, sidecar: IndexSidecar) -> FaissIndex:
    """The index that a sidecar describes. Raises StoreError unless its file is whole."""
    return FaissIndex.read(whole_file(folder, sidecar), sidecar.spread, mapped=True)


def whole_file(folder: str, sidecar: IndexSidecar) -> Path:
    """The file that a sidecar describes. Raises StoreError unless it is whole."""
    file = require_size(folder, sidecar)
    if storage.digest_file(file) != sidecar.digest:
        raise StoreError(f"{file} is damaged: its checksum does not fit", remedy=REBUILD)
    return Path(file)
