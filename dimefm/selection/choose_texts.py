"""Which sentences are kept: a ranking, then conditions, de-duplication, balance and size.

Shapes: T sentences of the store, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from cache_schemas.text_selection import SelectionSettings
from dimefm.selection.clusters import capped, cluster, cluster_count, repetitions
from dimefm.store.embedding_store import Store
from dimefm.system.progress import Progress


class Outcome(IntEnum):
    """What became of a sentence: kept, or the first reason that it was left out for, in their order."""

    KEPT = 0
    NO_EMBEDDING = 1
    ELSEWHERE = 2
    FEW_HITS = 3
    LOW_SCORE = 4
    POOL = 5
    REPEATED = 6
    CAP = 7
    SIZE = 8


REASONS = {
    Outcome.NO_EMBEDDING: "without an embedding",
    Outcome.ELSEWHERE: "not among the rows given",
    Outcome.FEW_HITS: "of fewer images than --min-hits",
    Outcome.LOW_SCORE: "below --min-score",
    Outcome.POOL: "beyond --pool",
    Outcome.REPEATED: "repeated, by --dedup",
    Outcome.CAP: "above the cap of their cluster, by --balance",
    Outcome.SIZE: "beyond --size",
}


@dataclass(frozen=True)
class ChosenTexts:
    """The outcome of every sentence, uint8 (T,); the rows that repeat another and the row that each repeats, int (R,);
    the number of clusters and the cap on each, None where there were none."""

    outcome_T: np.ndarray[Any, Any]
    repeated: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    clusters: int | None
    cap: int | None


def ranking(
    settings: SelectionSettings,
    rows_C: np.ndarray[Any, Any],
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Ascending rows put in order of rank, best first; equals in order of row."""
    if settings.by == "random":
        return np.random.default_rng((settings.seed, 4)).permutation(rows_C)
    if settings.by == "similarity":
        return rows_C[np.argsort(-score_T[rows_C], kind="stable")]
    return rows_C[np.lexsort((-score_T[rows_C], -hits_T[rows_C].astype(np.int64)))]


def choose_texts(
    settings: SelectionSettings,
    texts: Store,
    outcome_T: np.ndarray[Any, Any],
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
    *,
    device: str,
) -> ChosenTexts:
    """Apply the conditions in their order: those that `outcome_T` says are kept may drop out.

    `score_T` is NaN where a sentence has no score. Memory: a few numbers per sentence; embeddings are read in blocks,
    and only where clusters are made.
    """
    outcome_T = outcome_T.copy()
    if settings.min_hits is not None:
        outcome_T[(outcome_T == Outcome.KEPT) & (hits_T < settings.min_hits)] = Outcome.FEW_HITS
    if settings.min_score is not None:
        outcome_T[(outcome_T == Outcome.KEPT) & ~(score_T >= settings.min_score)] = Outcome.LOW_SCORE
    order_C = ranking(settings, np.flatnonzero(outcome_T == Outcome.KEPT), hits_T, score_T)
    if settings.pool is not None:
        outcome_T[order_C[settings.pool :]] = Outcome.POOL
        order_C = order_C[: settings.pool]
    repeated, clusters, cap = (order_C[:0], order_C[:0]), None, None
    if (settings.dedup is not None or settings.balance) and len(order_C):
        label_C = _labels(settings, texts, order_C, device)
        clusters = cluster_count(len(order_C))
        if settings.dedup is not None:
            with Progress("comparing", len(order_C), "text") as progress:
                limit = settings.dedup
                like_C = repetitions(texts, order_C, label_C, limit, device=device, progress=progress.at)
            repeats_C = like_C >= 0
            outcome_T[order_C[repeats_C]] = Outcome.REPEATED
            repeated = order_C[repeats_C], like_C[repeats_C]
            order_C, label_C = order_C[~repeats_C], label_C[~repeats_C]
        if settings.balance and settings.size is not None:
            inside_C, cap = capped(label_C, settings.size)
            outcome_T[order_C[~inside_C]] = Outcome.CAP
            order_C = order_C[inside_C]
    if settings.size is not None:
        outcome_T[order_C[settings.size :]] = Outcome.SIZE
    return ChosenTexts(outcome_T, repeated, clusters, cap)


def _labels(
    settings: SelectionSettings, texts: Store, order_C: np.ndarray[Any, Any], device: str
) -> np.ndarray[Any, Any]:
    """The cluster of each candidate, int32 (C,); the store is read in order of row."""
    rows_C = np.sort(order_C)
    with Progress("clustering", len(rows_C), "text") as progress:
        label_C = cluster(texts, rows_C, seed=settings.seed, device=device, progress=progress.at)
    return label_C[np.searchsorted(rows_C, order_C)]
