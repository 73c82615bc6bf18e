"""The order of rows that are drawn from several stores: each store has its own order, and a share of every batch.

A store's rows are a stream without end, pass after pass, in the order that training.row_order gives them. After s steps
so much of its stream has been used as its share of s batches is, rounded; the store with the largest share fills what
is left. So the rows of any step are known without those before it.

Shapes: P stores, G rows of a global batch, S steps, N any rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dimefm.errors import TrainingError
from dimefm.store.embedding_store import Store
from dimefm.store.joined_store import JoinedStore
from dimefm.training.row_order import WINDOW_BATCHES, WINDOW_ROWS, Order

_Rows = np.ndarray[Any, Any]
_STREAM = 0x570E  # beside the streams of row_order, one for each store
_SHUFFLE = 0x5FF1


def order_of(
    store: Store, *, seed: int, batch_size: int, only: _Rows | None = None, kind: Literal["blocks", "chunks"]
) -> Order:
    """The order of the images of a run; of a store alone, `only` of these rows. Raises TrainingError for a batch that
    is too small for so many stores."""
    if isinstance(store, JoinedStore):
        assert only is None
        return MixedOrder(store=store, seed=seed, batch_size=batch_size, kind=kind)
    return Order(store=store, seed=seed, batch_size=batch_size, only=only, kind=kind)


@dataclass(frozen=True, kw_only=True)
class MixedOrder(Order):
    """Global batches of rows of a `JoinedStore`. An epoch has as many rows as all stores have, times their weights: in
    it the rows of a store are shown as often as its weight says, one pass after the other."""

    store: JoinedStore

    def __post_init__(self) -> None:
        parts = len(self.store.parts)
        if self.batch_size < parts**2:  # then the largest share has room for what the others are rounded to
            what = f"a batch of {self.batch_size} is too small for {parts} image stores"
            raise TrainingError(what, remedy=f"give a larger --batch-size, {parts**2} at least")

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch, rounded down."""
        weighted = zip(self._orders, self.store.weights, strict=True)
        return int(sum(order.rows * weight for order, weight in weighted))

    def windows(self, first: int, stop: int) -> Iterator[tuple[int, int, _Rows]]:
        """As of an Order."""
        for step, epoch, rows_SG, _ in self.windows_in_passes(first, stop):
            yield step, epoch, rows_SG

    def windows_in_passes(self, first: int, stop: int) -> Iterator[tuple[int, int, _Rows, _Rows | None]]:
        """`windows`, with the pass over its store that each row is shown in, int64 (S, G)."""
        streams = [
            _Stream(order, int(begin), int(end))
            for order, begin, end in zip(self._orders, *self._used(np.array([first, stop])), strict=True)
        ]
        most = max(WINDOW_BATCHES, WINDOW_ROWS // self.batch_size)
        step = first
        while step < stop:
            epoch = step // self.steps_per_epoch
            end = min(stop, step + most, (epoch + 1) * self.steps_per_epoch)
            counts_SP = np.diff(self._used(np.arange(step, end + 1)), axis=0)
            taken = [stream.take(int(count)) for stream, count in zip(streams, counts_SP.sum(axis=0), strict=True)]
            rows_SG, passes_SG = self._batches(step, counts_SP, taken)
            yield step, epoch, rows_SG, passes_SG
            step = end

    def _batches(self, first: int, counts_SP: _Rows, taken: list[tuple[_Rows, _Rows]]) -> tuple[_Rows, _Rows]:
        """The rows and passes of steps (S, G), of what was taken from each stream. The rows of a batch are shuffled: a
        part of a batch, as a process has it, is as mixed as the whole."""
        rows_SG = np.empty((len(counts_SP), self.batch_size), np.int64)
        passes_SG = np.empty_like(rows_SG)
        at_P = np.zeros(counts_SP.shape[1], np.int64)
        for number, counts_P in enumerate(counts_SP):
            spans = [slice(at, at + count) for at, count in zip(at_P.tolist(), counts_P.tolist(), strict=True)]
            shuffled_G = np.random.default_rng((self.seed, _SHUFFLE, first + number)).permutation(self.batch_size)
            parts = list(zip(taken, spans, strict=True))
            starts = [self.store.start(part) for part in range(len(parts))]
            rows = [rows_N[span] + start for ((rows_N, _), span), start in zip(parts, starts, strict=True)]
            rows_SG[number] = np.concatenate(rows)[shuffled_G]
            passes_SG[number] = np.concatenate([passes_N[span] for (_, passes_N), span in parts])[shuffled_G]
            at_P += counts_P
        return rows_SG, passes_SG

    def _used(self, steps_S: _Rows) -> _Rows:
        """How many rows of each stream so many steps use, int64 (S, P)."""
        shares_P = self.store.shares
        used_SP = np.floor(np.outer(steps_S, shares_P * self.batch_size) + 0.5).astype(np.int64)
        used_SP[:, shares_P.argmax()] += steps_S * self.batch_size - used_SP.sum(axis=1)
        return used_SP

    @cached_property
    def _orders(self) -> list[Order]:
        return [
            Order(store=store, seed=self.seed, batch_size=1, stream=_STREAM + part, kind=self.kind)
            for part, store in enumerate(self.store.parts)
        ]


class _Stream:
    """The rows first..stop-1 of an order without end, with the pass that each is of."""

    def __init__(self, order: Order, first: int, stop: int) -> None:
        self._windows = order.windows(first, stop)
        self._rows_N = self._passes_N = np.empty(0, np.int64)

    def take(self, count: int) -> tuple[_Rows, _Rows]:
        """The next rows and their passes, int64 (N,)."""
        rows, passes, there = [self._rows_N], [self._passes_N], len(self._rows_N)
        while there < count:
            _, epoch, rows_N1 = next(self._windows)
            rows.append(rows_N1[:, 0])
            passes.append(np.full(len(rows_N1), epoch, np.int64))
            there += len(rows_N1)
        rows_N, passes_N = np.concatenate(rows), np.concatenate(passes)
        self._rows_N, self._passes_N = rows_N[count:], passes_N[count:]
        return rows_N[:count], passes_N[:count]
