"""The order of training rows: a pure function of the seed and the epoch.

"blocks" is the order of new runs: eight neighbouring rows are a block, and a window of a million rows is made of blocks
from all over the store. Batches are nearly as well mixed as if each row had been drawn by itself, even if the source is
sorted by class. "chunks" is the order of older runs, and of large stores at URLs, where more than one request per chunk
costs too much: a window is 65,536 rows in whole chunks. In both the rows of a window are shuffled, and memory stays
bounded.

Shapes: G rows of a global batch, S steps, N any rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from cache_schemas import Status
from dimefm.store.embedding_store import Store

WINDOW_ROWS, WINDOW_BATCHES, BLOCK_ROWS = 2**20, 256, 8
"""For "blocks": a window has at least this many rows, and batches. So even in a large batch few rows are of the
same block."""

CHUNKS_WINDOW_ROWS = 65536


@dataclass(frozen=True, kw_only=True)
class Order:
    """Global batches of `batch_size` rows of a store, epoch after epoch; the incomplete last one of an epoch is left
    out.

    Rows without an embedding never appear. If `only` is given, row numbers in ascending order, just these rows appear.
    `stream` tells the orders of one run apart.
    """

    store: Store
    seed: int
    batch_size: int
    only: np.ndarray[Any, Any] | None = field(default=None, repr=False)
    stream: int = 0
    kind: Literal["blocks", "chunks"] = "blocks"

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch. Found once: for "blocks" the status of every row is read, for "chunks" every commit."""
        if self.only is not None:
            return len(self.only)
        if self.kind == "chunks":
            return self.store.contents.good
        return self.store.schema.rows - len(self._left_out)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.rows // self.batch_size

    def steps(self, first: int, stop: int) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
        """Step, epoch and rows int64 (G,) of each of the steps first..stop-1, which may go through several epochs."""
        for step, epoch, rows_SG in self.windows(first, stop):
            for number, rows_G in enumerate(rows_SG):
                yield step + number, epoch, rows_G

    def windows(self, first: int, stop: int) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
        """The same steps, a window at a time: the first step of the window, the epoch, and rows int64 (S, G)."""
        step = first
        while step < stop:
            epoch, skip = divmod(step, self.steps_per_epoch)
            for window_SG in self._blocks(epoch, skip) if self.kind == "blocks" else self._chunks(epoch, skip):
                rows_SG = window_SG[: stop - step]
                if len(rows_SG):
                    yield step, epoch, rows_SG
                step += len(rows_SG)
                if step == stop:  # the rest of the epoch is not needed
                    return

    def windows_in_passes(
        self, first: int, stop: int
    ) -> Iterator[tuple[int, int, np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
        """`windows`, with the pass over its store that each row is shown in, int64 (S, G); None: the epoch."""
        for step, epoch, rows_SG in self.windows(first, stop):
            yield step, epoch, rows_SG, None

    def _blocks(self, epoch: int, skip: int) -> Iterator[np.ndarray[Any, Any]]:
        """The windows of an epoch, int64 (S, G), from its batch `skip` on. Earlier ones are not made.

        The rows that count are cut into blocks, which are put in a random order. Where the first block begins differs
        from epoch to epoch.
        """
        key = (self.seed, epoch, self.stream, 0xB10C)
        rng = np.random.default_rng(key)
        whole, shift = self.rows // BLOCK_ROWS, int(rng.integers(self.rows))
        shuffled_N = rng.permutation(np.arange(whole, dtype=np.uint32))
        block_N = np.append(shuffled_N, np.uint32(whole))  # the last block may not be full
        steps = self.steps_per_epoch
        windows = max(1, steps // max(WINDOW_BATCHES, WINDOW_ROWS // self.batch_size))
        for window in range(windows):
            first, stop = (steps * number // windows for number in (window, window + 1))
            if stop <= skip:
                continue
            place_N = np.arange(first * self.batch_size, stop * self.batch_size if stop < steps else self.rows)
            chosen_N = block_N[place_N // BLOCK_ROWS].astype(np.int64) * BLOCK_ROWS + place_N % BLOCK_ROWS + shift
            row_N = np.random.default_rng((*key, window)).permutation(self._rows(chosen_N % self.rows))
            rows_SG = row_N[: (stop - first) * self.batch_size].reshape(stop - first, self.batch_size)
            yield rows_SG[max(0, skip - first) :]

    def _rows(self, number_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Row numbers int64 (N,) of rows that count, from their numbers if only rows that count are numbered."""
        if self.only is not None:
            row_N: np.ndarray[Any, Any] = self.only[number_N].astype(np.int64)
            return row_N
        before_N = self._left_out - np.arange(len(self._left_out))  # rows that count before each that does not
        return number_N + np.searchsorted(before_N, number_N, side="right")

    @cached_property
    def _left_out(self) -> np.ndarray[Any, Any]:
        """The rows without an embedding, int64 (N,), ascending."""
        spans = map(self.store.schema.shard_range, range(self.store.schema.shards))
        found = [np.flatnonzero(self.store.status(*span) != Status.OK) + span[0] for span in spans]
        return np.concatenate(found)

    def _chunks(self, epoch: int, skip: int) -> Iterator[np.ndarray[Any, Any]]:
        """The same for the order of older runs, which must not change. A batch may reach into the next window."""
        rng = np.random.default_rng((self.seed, epoch, self.stream) if self.stream else (self.seed, epoch))
        size = self.store.schema.chunk_rows
        blocks = rng.permutation(-(-self.store.schema.rows // size))
        per_window = max(1, CHUNKS_WINDOW_ROWS // size)
        waiting = np.empty(0, np.int64)
        for at in range(0, len(blocks), per_window):
            window = np.concatenate([self._chunk(int(b) * size, size) for b in blocks[at : at + per_window]])
            waiting = np.concatenate([waiting, rng.permutation(window)])
            whole = len(waiting) // self.batch_size
            yield waiting[: whole * self.batch_size].reshape(whole, self.batch_size)[skip:]
            skip = max(0, skip - whole)
            waiting = waiting[whole * self.batch_size :]

    def _chunk(self, start: int, size: int) -> np.ndarray[Any, Any]:
        """The rows of one chunk that count, int64 (N,)."""
        stop = min(start + size, self.store.schema.rows)
        if self.only is not None:
            return self.only[slice(*np.searchsorted(self.only, (start, stop)))].astype(np.int64)
        return np.flatnonzero(self.store.status(start, stop) == Status.OK) + start
