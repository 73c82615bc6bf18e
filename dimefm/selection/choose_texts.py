"""Decides which sentences are kept: a ranking, then conditions, de-duplication, balance and size.

Shapes: T sentences of the store, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schemas.text_selection import SelectionSettings
from dimefm.selection.narrow import Limits, Narrowed, Outcome, narrow
from dimefm.store.embedding_store import Store
from dimefm.system.shard_work import ShardRunner

REASON_TEXTS = {
    Outcome.NO_EMBEDDING: "without an embedding",
    Outcome.ELSEWHERE: "not among the rows given",
    Outcome.LEAKED: "in a test set, by --without",
    Outcome.FEW_HITS: "with fewer hits than --min-hits",
    Outcome.LOW_SCORE: "below --min-score",
    Outcome.POOL: "beyond --pool",
    Outcome.REPEATED: "repeated, by --dedup",
    Outcome.CAP: "above the cap of their cluster, by --balance",
    Outcome.SIZE: "beyond --size",
}
"""As selection.json has them."""


def in_words(reason: str, settings: SelectionSettings, cap: int | None) -> str:
    """A reason of selection.json for a person: by which setting, and what it was, sentences were left out."""
    hits = f"fewer than {settings.min_hits} images have them in their top k (--min-hits)"
    words = {
        Outcome.FEW_HITS: hits if (settings.min_hits or 0) > 1 else "no image has them in its top k",
        Outcome.LOW_SCORE: f"a score below {settings.min_score} (--min-score)",
        Outcome.POOL: f"ranked after the best {settings.pool} (--pool)",
        Outcome.REPEATED: f"a cosine of {settings.dedup} or more to a better one (--dedup)",
        Outcome.CAP: f"ranked after the best {cap} of their cluster (--balance)",
        Outcome.SIZE: f"ranked after the best {settings.size} (--size)",
    }
    outcome = next((outcome for outcome, text in REASON_TEXTS.items() if text == reason), Outcome.KEPT)
    return words.get(outcome, reason)


@dataclass(frozen=True)
class ChosenTexts(Narrowed):
    """As `Narrowed`, and the outcome of every sentence, uint8 (T,)."""

    outcome_T: np.ndarray[Any, Any]


def ranking(
    settings: SelectionSettings,
    rows_C: np.ndarray[Any, Any],
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Ascending rows in the order of their rank, best first; equals in the order of their rows."""
    if settings.by == "random":
        return np.random.default_rng((settings.seed, 4)).permutation(rows_C)
    if settings.by == "similarity":
        return rows_C[np.argsort(-score_T[rows_C], kind="stable")]
    return rows_C[np.lexsort((-score_T[rows_C], -hits_T[rows_C].astype(np.int64)))]


def choose_texts(
    settings: SelectionSettings,
    texts: Store,
    usable_T: np.ndarray[Any, Any],
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
    *,
    rows: np.ndarray[Any, Any] | None,
    leaked: np.ndarray[Any, Any],
    folder: str,
    device: str,
    run: ShardRunner,
) -> ChosenTexts:
    """Rank the sentences and apply the conditions in their order.

    `usable_T` says which have an embedding; with `rows` only these may be kept, and none of `leaked`; `score_T` is
    NaN where there is no score. Memory: a few numbers per sentence; embeddings are read a shard at a time, and only
    to make clusters, in `folder`.
    """
    outcome_T = np.where(usable_T, Outcome.KEPT, Outcome.NO_EMBEDDING).astype(np.uint8)
    if rows is not None:
        given_T = np.zeros(len(outcome_T), bool)
        given_T[rows] = True
        outcome_T[usable_T & ~given_T] = Outcome.ELSEWHERE
    outcome_T[leaked[outcome_T[leaked] == Outcome.KEPT]] = Outcome.LEAKED
    if settings.min_hits is not None:
        outcome_T[(outcome_T == Outcome.KEPT) & (hits_T < settings.min_hits)] = Outcome.FEW_HITS
    if settings.min_score is not None:
        outcome_T[(outcome_T == Outcome.KEPT) & ~(score_T >= settings.min_score)] = Outcome.LOW_SCORE
    order_C = ranking(settings, np.flatnonzero(outcome_T == Outcome.KEPT), hits_T, score_T)
    limits = Limits(settings.pool, settings.dedup, settings.balance, settings.size, settings.seed)
    found = narrow(limits, texts, order_C, outcome_T, folder=folder, device=device, run=run)
    return ChosenTexts(found.repeated, found.clusters, found.cap, outcome_T)
