"""The end of every selection: of ranked rows the best, none that repeats a better one, from every cluster as many.

Shapes: T rows of the store, C candidates, R rows that repeat another.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.shard_work import ShardRunner

_Array = np.ndarray[Any, Any]


class Outcome(IntEnum):
    """What became of a row: it was kept, or left out by one of these conditions, which apply in this order."""

    KEPT = 0
    NO_EMBEDDING = 1
    ELSEWHERE = 2
    LEAKED = 3
    FEW_HITS = 4
    LOW_SCORE = 5
    COPY = 6
    UNWANTED = 7
    POOL = 8
    REPEATED = 9
    CAP = 10
    SIZE = 11


@dataclass(frozen=True)
class Limits:
    """Only the best `pool` go on; of those with a cosine of `dedup` or more to a better one none; with `balance` at
    most a cap of each cluster, the smallest that fills `size`; and then the best `size`. None: no limit. Clusters are
    made `passes` times, with other seeds: two rows that are alike may lie on the border of two clusters, and are then
    not compared in that pass."""

    pool: int | None
    dedup: float | None
    balance: bool
    size: int | None
    seed: int
    passes: int = 1


@dataclass(frozen=True)
class Narrowed:
    """The rows that repeat another and the row that each repeats, int (R,); the number of clusters and the cap on each,
    None where there were none."""

    repeated: tuple[_Array, _Array]
    clusters: int | None
    cap: int | None


def narrow(
    limits: Limits, store: Store, order_C: _Array, outcome_T: _Array, *, folder: str, device: str, run: ShardRunner
) -> Narrowed:
    """Apply the limits to the rows `order_C`, best first, and write into `outcome_T`, uint8 (T,), what became of those
    that are left out. Embeddings are read a shard at a time, and only to make clusters, in `folder`."""
    if limits.pool is not None:
        outcome_T[order_C[limits.pool :]] = Outcome.POOL
        order_C = order_C[: limits.pool]
    repeated, likes, clusters, cap = [order_C[:0]], [order_C[:0]], None, None
    if (limits.dedup is not None or limits.balance) and len(order_C):
        from dimefm.selection.clusters import capped, cluster, cluster_count  # imports torch
        from dimefm.selection.repetitions import repetitions

        copies, label_C = limits.dedup is not None, order_C[:0]
        for number in range(limits.passes if copies else 1):
            place = folder if not number else storage.join(folder, f"pass-{number + 1}")
            seed, clusters = limits.seed + number, cluster_count(len(order_C))
            label_C = cluster(store, order_C, place, seed=seed, device=device, copies=copies, run=run)
            if limits.dedup is not None:
                like_C = repetitions(store, order_C, label_C, place, limits.dedup, device=device, run=run)
                repeats_C = like_C >= 0
                outcome_T[order_C[repeats_C]] = Outcome.REPEATED
                repeated.append(order_C[repeats_C])
                likes.append(like_C[repeats_C])
                order_C, label_C = order_C[~repeats_C], label_C[~repeats_C]
        if limits.balance and limits.size is not None:
            inside_C, cap = capped(label_C, limits.size)
            outcome_T[order_C[~inside_C]] = Outcome.CAP
            order_C = order_C[inside_C]
    if limits.size is not None:
        outcome_T[order_C[limits.size :]] = Outcome.SIZE
    return Narrowed(_to_the_kept(np.concatenate(repeated), np.concatenate(likes), len(outcome_T)), clusters, cap)


def _to_the_kept(rows_R: _Array, like_R: _Array, rows: int) -> tuple[_Array, _Array]:
    """The same, where a row that was repeated was left out itself in a later pass: with what that one repeats."""
    like_T = np.full(rows, -1, np.int64)
    like_T[rows_R] = like_R
    while (further_R := like_T[like_R] >= 0).any():
        like_R = np.where(further_R, like_T[like_R], like_R)
    return rows_R, like_R
