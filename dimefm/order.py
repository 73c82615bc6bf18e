"""The order of training rows: a pure function of the seed and the epoch.

Blocks of rows that lie together on disk are shuffled, then the rows within a window of blocks: reads stay near each
other, memory stays bounded, and any step can be found again. Shapes: G rows of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cache_schemas import Status
from dimefm.store import Store

WINDOW_ROWS = 65536


@dataclass(frozen=True, kw_only=True)
class Order:
    """Global batches of `batch_size` rows of a store, epoch after epoch; an epoch's incomplete last one is left out.

    Rows without an embedding never appear; where `only`, row numbers in ascending order, is given, no others do.
    `stream` tells the orders of one run apart.
    """

    store: Store
    seed: int
    batch_size: int
    only: np.ndarray[Any, Any] | None = field(default=None, repr=False)
    stream: int = 0

    @cached_property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        if self.only is not None:
            return len(self.only) // self.batch_size
        return self.store.contents.good // self.batch_size

    def batches(self, epoch: int, skip: int = 0) -> Iterator[np.ndarray[Any, Any]]:
        """Row numbers of each batch of an epoch, int64 (G,), from batch `skip` on: those that a run from the start
        would give."""
        rng = np.random.default_rng((self.seed, epoch, self.stream) if self.stream else (self.seed, epoch))
        size = self.store.schema.chunk_rows
        blocks = rng.permutation(-(-self.store.schema.rows // size))
        per_window = max(1, WINDOW_ROWS // size)
        waiting = np.empty(0, np.int64)
        for at in range(0, len(blocks), per_window):
            window = np.concatenate([self._rows(int(b) * size, size) for b in blocks[at : at + per_window]])
            waiting = np.concatenate([waiting, rng.permutation(window)])
            whole = len(waiting) // self.batch_size
            for batch in waiting[: whole * self.batch_size].reshape(whole, self.batch_size):
                if skip:
                    skip -= 1
                else:
                    yield batch
            waiting = waiting[whole * self.batch_size :]

    def steps(self, first: int, stop: int) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
        """Step, epoch and rows of the steps first..stop-1, through as many epochs as they take."""
        per_epoch = self.steps_per_epoch
        step = first
        while step < stop:
            epoch, skip = divmod(step, per_epoch)
            for rows in self.batches(epoch, skip):
                if step >= stop:
                    return
                yield step, epoch, rows
                step += 1

    def _rows(self, start: int, size: int) -> np.ndarray[Any, Any]:
        stop = min(start + size, self.store.schema.rows)
        if self.only is not None:
            return self.only[slice(*np.searchsorted(self.only, (start, stop)))].astype(np.int64)
        return np.flatnonzero(self.store.status(start, stop) == Status.OK) + start
