"""Bring what a run will read of stores at URLs into the cache of this machine, before it is wanted.

A process of its own goes through the windows of the order, two before the loaders. Sentences are drawn from all of
their store at every step: see store.local_copy.
"""

from __future__ import annotations

import heapq
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any

import numpy as np

from cache_schemas import SchemaError
from dimefm.errors import DimefmError
from dimefm.store.embedding_store import opened
from dimefm.store.pairs_store import Pairs
from dimefm.system import storage
from dimefm.system.file_cache import active
from dimefm.training.row_order import Order

_WINDOWS_AHEAD = 2
_LOOK_EVERY = 0.1  # seconds between two looks at how far the loaders are

_Rows = np.ndarray[Any, Any]
Position = np.ndarray[tuple[int], np.dtype[np.int64]]
"""The step that batches are asked for at present, shared between processes."""


@contextmanager
def fetching_ahead(
    orders: Sequence[Order], pairs: Sequence[Pairs], first: int, steps: int
) -> Iterator[Position | None]:
    """Within the block a process fetches what the steps first..steps-1 will read, ahead of the position, which the
    block must set. None where there is nothing to fetch, or another process of this machine does it. The process is
    forked."""
    far = [order for order in orders if storage.is_url(order.store.path)]
    far_pairs = [one for one in pairs if storage.is_url(one.path)]
    if active() is None or not (far or far_pairs) or int(os.environ.get("LOCAL_RANK", "0")):
        yield None
        return
    for order in orders:
        _ = order.store.contents, order.rows  # read once, for all processes that are forked
    position = np.frombuffer(mmap.mmap(-1, 8), np.int64)
    position[0] = first
    process = get_context("fork").Process(
        target=_fetch, args=(orders, far_pairs, first, steps, position, os.getpid()), daemon=True, name="fetch-ahead"
    )
    process.start()
    try:
        yield position
    finally:
        process.kill()
        process.join()


def _fetch(
    orders: Sequence[Order], pairs: Sequence[Pairs], first: int, steps: int, position: Position, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for loaders: the training process ends it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stores, pairs = [opened(order.store) for order in orders], [Pairs(one.path, cached=True) for one in pairs]
    begun = [deque[int](maxlen=_WINDOWS_AHEAD) for _ in orders]
    with suppress(DimefmError, SchemaError, OSError):  # whoever wants the data meets it too, and names it
        for step, number, rows_SG in heapq.merge(*(_windows(*each, first, steps) for each in enumerate(orders))):
            while len(begun[number]) == _WINDOWS_AHEAD and position[0] < begun[number][0] and os.getppid() == parent:
                time.sleep(_LOOK_EVERY)
            if os.getppid() != parent:  # it was killed
                return
            begun[number].append(step)
            rows_N = np.unique(rows_SG)
            stores[number].fetch(rows_N, pixels=True)
            for one in () if number else pairs:
                one.fetch(rows_N)


def _windows(number: int, order: Order, first: int, steps: int) -> Iterator[tuple[int, int, _Rows]]:
    for step, _, rows_SG in order.windows(first, steps):
        yield step, number, rows_SG
