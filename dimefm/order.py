"""The order of training rows: a pure function of the seed and the epoch.

Blocks of rows that lie together on disk are shuffled, then the rows within a window of blocks: reads stay near each
other, memory stays bounded, and any step can be found again. Shapes: G rows of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cache_schemas import Status
from dimefm.store import Store

WINDOW_ROWS = 65536


def steps_per_epoch(store: Store, batch_size: int) -> int:
    """Whole global batches among the rows that have an embedding."""
    valid = sum(commit.counts.get(Status.OK.name, 0) for commit in store.commits())
    return valid // batch_size


def epoch_batches(
    store: Store, *, seed: int, epoch: int, batch_size: int, skip: int = 0
) -> Iterator[np.ndarray[Any, Any]]:
    """Row numbers of each global batch of an epoch, int64 (G,), from batch `skip` on; an incomplete last one is left.

    Rows without an embedding never appear. The batches after `skip` are those that a run from the start would give.
    """
    rng = np.random.default_rng((seed, epoch))
    size = store.schema.chunk_rows
    blocks = rng.permutation(-(-store.schema.rows // size))
    per_window = max(1, WINDOW_ROWS // size)
    waiting = np.empty(0, np.int64)
    for at in range(0, len(blocks), per_window):
        window = np.concatenate([_valid_rows(store, int(b) * size, size) for b in blocks[at : at + per_window]])
        waiting = np.concatenate([waiting, rng.permutation(window)])
        whole = len(waiting) // batch_size
        for batch in waiting[: whole * batch_size].reshape(whole, batch_size):
            if skip:
                skip -= 1
            else:
                yield batch
        waiting = waiting[whole * batch_size :]


def _valid_rows(store: Store, start: int, size: int) -> np.ndarray[Any, Any]:
    stop = min(start + size, store.schema.rows)
    return np.flatnonzero(store.status(start, stop) == Status.OK) + start
