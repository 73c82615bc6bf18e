"""Read ahead of need, by many requests at a time, where each takes long, as at a URL."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from dimefm.system import storage

URL_BLOCK = 8 << 20
"""Bytes per request where a file is read from beginning to end."""


_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_order(work: Callable[[_In], _Out], items: Sequence[_In], threads: int = storage.CONNECTIONS) -> Iterator[_Out]:
    """The result of `work` for each item, in the order of the items, on this many threads; at most that many results
    are held."""
    pool = ThreadPoolExecutor(threads)
    try:
        ahead = iter(items)
        waiting = deque(pool.submit(work, item) for item in islice(ahead, threads))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(ahead, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def reading_ahead(work: Callable[[_In], _Out], items: Sequence[_In], path: str) -> Iterator[_Out]:
    """The result of `work`, which reads at `path`, for each item in order: many at a time at a URL, where each waits
    for an answer; one after the other on a disk."""
    return in_order(work, items) if storage.is_url(path) else map(work, items)
