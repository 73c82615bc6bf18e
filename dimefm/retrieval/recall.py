"""How well an index searches, against exact search, and the cheapest parameters that reach a target.

Shapes: Q queries, D width, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from cache_schemas import Recall, Status
from cache_schemas.index import TriedSearch
from dimefm.errors import StoreError
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_search import SearchParameters
from dimefm.store.embedding_store import Store

RECALL_K, QUERIES = 10, 1000
_TIE = 1e-6
_CLOSE, _SATURATES = 0.003, 0.5  # recall that more lists must add to be worth their time, once this much is found


class TunableIndex(Protocol):
    """What `tune` needs of an index: the parameters to try, and a search with any of them."""

    def probes(self) -> Sequence[int]:
        """Numbers of lists to try, ascending; (0,) where there are no lists."""

    def search_with(self, parameters: SearchParameters, queries_QD: Any, k: int) -> tuple[Any, Any]:
        """Scores (Q, K) and rows (Q, K)."""


@dataclass(frozen=True)
class RecallQueries:
    """Queries of one kind, `source`, to measure the recall with: vectors, and the scores and rows of their exact
    neighbours. A query that is a row of the store does not count itself: `own_row_Q` is that row, -1 for other queries.
    """

    source: str
    vectors_QD: np.ndarray[Any, Any]
    own_row_Q: np.ndarray[Any, Any]
    scores_QK: np.ndarray[Any, Any]
    rows_QK: np.ndarray[Any, Any]

    def recall(self, scores_QK: np.ndarray[Any, Any], rows_QK: np.ndarray[Any, Any]) -> float:
        """The mean share of the exact top 10 that a search found. `scores_QK` and `rows_QK` are its results, 11 or more
        per query.

        Rows with the same score are worth the same: any row that ties with the tenth counts.
        """
        shares = []
        found = zip(self.own_row_Q, self.scores_QK, self.rows_QK, scores_QK, rows_QK, strict=True)
        for own, true_scores, true_rows, scores, rows in found:
            others = (true_rows != own) & (true_rows >= 0)
            if not others.any():
                continue
            expected, least = set(true_rows[others][:RECALL_K].tolist()), float(true_scores[others][:RECALL_K].min())
            got = [(r, s) for r, s in zip(rows.tolist(), scores.tolist(), strict=True) if r not in (own, -1)][:RECALL_K]
            hits = sum(r in expected or abs(s - least) < _TIE for r, s in got)
            shares.append(min(hits, len(expected)) / len(expected))
        return float(np.mean(shares)) if shares else 1.0


def draw_recall_queries(
    store: Store, ranges: Sequence[tuple[int, int]], images: Store | None, seed: int
) -> list[RecallQueries]:
    """Queries for an index over the rows of `ranges`: random rows of `images` first, if it is given, then random rows
    of the store itself. The two differ: an image is further from all sentences than a sentence is."""
    rng = np.random.default_rng(seed + 1)
    search = ExactSearch(store, ranges=ranges)
    sources = [(images, [(0, images.schema.rows)])] if images else []
    found = []
    for other, drawn_from in [*sources, (store, ranges)]:
        rows_Q, vectors_QD = _draw(other, drawn_from, rng)
        own_Q = rows_Q if other is store else np.full(len(rows_Q), -1)
        scores_QK, found_QK = search.search(vectors_QD, RECALL_K + 1)
        found.append(RecallQueries(other.schema.kind, vectors_QD, own_Q, scores_QK, found_QK))
    return found


def _draw(store: Store, ranges: Sequence[tuple[int, int]], rng: np.random.Generator) -> tuple[Any, Any]:
    """Up to QUERIES random rows that have an embedding, ascending, and their embeddings float32 (Q, D). Raises
    StoreError where no row has one."""
    every = np.concatenate([start + np.flatnonzero(store.status(start, stop) == Status.OK) for start, stop in ranges])
    chosen = np.sort(rng.choice(every, min(len(every), QUERIES), replace=False))
    read = [store.valid_rows(row, row + 1) for row in chosen.tolist()]
    parts = [(rows, vectors) for rows, vectors in read if len(rows)]
    if not parts:
        what = f"{store.path} has no embedding to measure the recall with"
        raise StoreError(what, remedy="see dimefm info for what failed")
    rows_Q, vectors_QD = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return rows_Q, vectors_QD.astype(np.float32)


def tune(index: TunableIndex, depths: Sequence[int], queries: RecallQueries, target: float) -> Recall:
    """The fastest parameters that reach the target over queries of one kind, with their recall. Where none do, the
    fewest lists that come close to the best recall, with the most candidates.

    `depths` are the values of `rescore` to try, ascending; (1,) for none. Recall grows with the lists probed and with
    the candidates scored again. So for each depth, from the deepest on, the fewest lists that are enough are looked
    for, and only these parameters are timed.
    """

    measured: dict[SearchParameters, TriedSearch] = {}

    def recall_of(parameters: SearchParameters) -> float:
        if parameters not in measured:
            began = time.perf_counter()
            found = index.search_with(parameters, queries.vectors_QD, RECALL_K + 1)
            rate = len(queries.vectors_QD) / max(time.perf_counter() - began, 1e-9)
            measured[parameters] = TriedSearch(
                probes=parameters.probes,
                rescore=parameters.rescore,
                value=queries.recall(*found),
                queries_per_second=round(rate, 1),
            )
        return measured[parameters].value

    probes, enough, least = index.probes(), list[SearchParameters](), 0
    for depth in reversed(depths):
        options = [SearchParameters(count, depth) for count in probes]
        tried = _climb(options[least:], recall_of, target)
        found = next((one for one in tried if recall_of(one) >= target), None)
        if found is None:
            if not enough:
                best = max(map(recall_of, tried))
                enough = [next(one for one in tried if recall_of(one) >= best - _CLOSE)]
            break
        enough.append(found)
        least = options.index(found)
    speeds = {parameters: _speed(index, queries, parameters) for parameters in enough}
    chosen = max(speeds, key=lambda parameters: speeds[parameters])
    return Recall(
        k=RECALL_K,
        queries=len(queries.vectors_QD),
        source=queries.source,
        value=round(recall_of(chosen), 4),
        search_parameters={"nprobe": chosen.probes} if chosen.probes else {},
        rescore=chosen.rescore,
        queries_per_second=round(speeds[chosen], 1),
        tried=tuple(replace(one, value=round(one.value, 4)) for one in measured.values()),
    )


def _climb(
    options: Sequence[SearchParameters], recall_of: Callable[[SearchParameters], float], target: float
) -> list[SearchParameters]:
    """The options that were tried, ascending: every second one, until one reaches the target or no longer finds more
    than the one before; then the one between the last two."""
    tried, before = list[SearchParameters](), 0.0
    for at in (*range(0, len(options) - 1, 2), len(options) - 1):
        tried.append(options[at])
        value = recall_of(options[at])
        if value >= target:
            return tried if at == 0 else [*tried[:-1], options[at - 1], options[at]]
        if value > _SATURATES and value - before < _CLOSE:
            break
        before = value
    return tried


def _speed(index: TunableIndex, queries: RecallQueries, parameters: SearchParameters) -> float:
    """Queries per second, the better of two runs."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        index.search_with(parameters, queries.vectors_QD, RECALL_K)
        seconds.append(time.perf_counter() - began)
    return len(queries.vectors_QD) / max(min(seconds), 1e-9)
