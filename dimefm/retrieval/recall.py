"""How well an index searches, against exact search, and the cheapest parameters that reach a target.

Shapes: Q queries, D width, K neighbours, C candidates.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from cache_schemas import Recall, Status
from dimefm.errors import StoreError
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.faiss_index import SearchParameters
from dimefm.store.embedding_store import Store

RECALL_K, QUERIES = 10, 1000
_TIE = 1e-6


class TunableIndex(Protocol):
    """What `tune` needs of an index: the settings that it has, and a search with any of them."""

    def probes(self) -> Sequence[int]:
        """Numbers of lists to try, ascending; (0,) where there are no lists."""

    def search_with(self, setting: SearchParameters, queries_QD: Any, k: int) -> tuple[Any, Any]:
        """Scores (Q, K) and rows (Q, K)."""


@dataclass(frozen=True)
class RecallQueries:
    """Query vectors with their exact neighbours; for queries that are rows of the store itself which row each is
    (-1: none), so that it is left out of its own result."""

    source: str
    vectors_QD: np.ndarray[Any, Any]
    own_row_Q: np.ndarray[Any, Any]
    scores_QK: np.ndarray[Any, Any]
    rows_QK: np.ndarray[Any, Any]

    def recall(self, scores_QK: np.ndarray[Any, Any], rows_QK: np.ndarray[Any, Any]) -> float:
        """Mean share of the exact top 10 that was found, by what was found: at least 11 a query.

        Rows with the same score are worth the same: of those that tie with the tenth, any counts.
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
    """Queries for an index over the rows of `ranges`: random rows of `images` first, if there are such (their
    neighbours among sentences are another distribution than a sentence's own), then random rows of the store itself."""
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
    StoreError where none has: the recall of no query is no number."""
    every = np.concatenate([start + np.flatnonzero(store.status(start, stop) == Status.OK) for start, stop in ranges])
    chosen = np.sort(rng.choice(every, min(len(every), QUERIES), replace=False))
    parts = [part for row in chosen.tolist() if len((part := store.valid_rows(row, row + 1))[0])]
    if not parts:
        what = f"{store.path} has no embedding to measure the recall with"
        raise StoreError(what, remedy="see dimefm info for what failed")
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([v for _, v in parts]).astype(np.float32)


@dataclass(frozen=True)
class Tuning:
    """A setting, the queries a second it gave, and its recall by kind of query."""

    setting: SearchParameters
    queries_per_second: float
    recall: tuple[Recall, ...]


def tune(index: TunableIndex, depths: Sequence[int], queries: Sequence[RecallQueries], target: float) -> Tuning:
    """The fastest setting that reaches the target over the first kind of query; where none does, the most thorough.

    `depths` are those of re-scoring to try, ascending; (1,) for none. Recall grows with the lists probed and with the
    candidates scored again. So for every depth the fewest lists that are enough are found by bisection, the deepest
    first, and these settings alone are timed.
    """
    first, probes = queries[0], index.probes()

    @cache
    def reached(setting: SearchParameters) -> bool:
        return first.recall(*index.search_with(setting, first.vectors_QD, RECALL_K + 1)) >= target

    enough, least = [], 0
    for depth in reversed(depths):
        reaches = [SearchParameters(count, depth) for count in probes]
        least = bisect_left(reaches, True, lo=least, key=reached)
        if least == len(probes):
            break
        enough.append(SearchParameters(probes[least], depth))
    candidates = enough or [SearchParameters(probes[-1], depths[-1])]
    speeds = {setting: _speed(index, first, setting) for setting in candidates}
    chosen = max(speeds, key=lambda setting: speeds[setting])
    recall = tuple(
        Recall(
            k=RECALL_K,
            queries=len(q.vectors_QD),
            source=q.source,
            value=round(q.recall(*index.search_with(chosen, q.vectors_QD, RECALL_K + 1)), 4),
        )
        for q in queries
    )
    return Tuning(chosen, round(speeds[chosen], 1), recall)


def _speed(index: TunableIndex, queries: RecallQueries, setting: SearchParameters) -> float:
    """Queries a second, the better of two runs."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        index.search_with(setting, queries.vectors_QD, RECALL_K)
        seconds.append(time.perf_counter() - began)
    return len(queries.vectors_QD) / max(min(seconds), 1e-9)
