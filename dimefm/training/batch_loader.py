"""Batches made ahead of time: the requests for them, the processes that make them, and how these end.

Shapes: S steps, G rows of a global batch, B of them of this process, N any rows.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_all_start_methods
from traceback import walk_tb
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cache_schemas import SchemaError
from dimefm.errors import DimefmError, TrainingError
from dimefm.sources.read_image import ImagePlace
from dimefm.training.fetch_ahead import Position
from dimefm.training.row_order import Order

THREAD = "read-ahead"
"""The names of threads that take items ahead of time begin so. None may be at work while a process is forked."""

_T = TypeVar("_T")
_NO_ROW = -1
_row_in_work = np.array([_NO_ROW])  # in a loader process: shared with the training process, see `note_row`
_GRACE = 30.0  # seconds that a loader process goes on after SIGTERM
_IMAGES_AHEAD = 2**18  # ten seconds of a GPU and a small student: the plans of a window are read in a few


@dataclass(frozen=True)
class Request:
    """What one batch is made of. `places_B` says where each image is, if they are read from their own files. `passes_B`
    says which pass over its store each image is shown in, where that is not the epoch. `window_N` are the rows of all
    batches of a window, in its first request, for a dataset that reads plans itself.
    """

    step: int
    epoch: int
    rows_B: np.ndarray[Any, Any]
    all_rows_G: np.ndarray[Any, Any]
    places_B: list[ImagePlace] | None = None
    window_N: np.ndarray[Any, Any] | None = None
    passes_B: np.ndarray[Any, Any] | None = None

    def passes(self) -> np.ndarray[Any, Any]:
        """`passes_B`, or the epoch for each image, int64 (B,)."""
        return np.full(len(self.rows_B), self.epoch) if self.passes_B is None else self.passes_B


class Requests(Sampler[Request]):
    """The requests for the batches of one process of `world`, in order, from the step `first` up to `steps`.

    If images are read from their own files, requests are made ahead of time, in a thread: at the beginning of a window
    the plans of all its shards are read, here for all loader processes.
    """

    def __init__(
        self, order: Order, *, first: int, steps: int, rank: int = 0, world: int = 1, position: Position | None = None
    ) -> None:
        """`position` gets the step that is asked for, for training.fetch_ahead."""
        self._order, self._first, self._steps, self._rank, self._world = order, first, steps, rank, world
        self._position = position
        schema = order.store.schema
        self._placed, self._is_text = schema.kind == "image" and not schema.pixels, schema.kind == "text"

    def __iter__(self) -> Iterator[Request]:
        left = self._steps - self._first + 1  # with the end of them: the first batch does not wait for more
        ahead = min(left, max(16, _IMAGES_AHEAD * self._world // self._order.batch_size))
        for request in take_ahead(self._made(), ahead) if self._placed else self._made():
            if self._position is not None:
                self._position[0] = request.step
            yield request

    def _made(self) -> Iterator[Request]:
        for first, epoch, rows_SG, passes_SG in self._order.windows_in_passes(self._first, self._steps):
            rows_SB = np.ascontiguousarray(rows_SG[:, self._rank :: self._world])
            passes_SB = repeat(None) if passes_SG is None else passes_SG[:, self._rank :: self._world]
            places = self._places(rows_SB) if self._placed else repeat(None)
            window_N = rows_SB.ravel() if self._is_text else None
            batches = zip(rows_SG, rows_SB, places, passes_SB, strict=False)
            for step, (rows_G, rows_B, places_B, passes_B) in enumerate(batches, first):
                yield Request(step, epoch, rows_B, rows_G, places_B, window_N, passes_B)
                window_N = None

    def _places(self, rows_SB: np.ndarray[Any, Any]) -> Iterator[list[ImagePlace]]:
        ascending_N, place_N = np.unique(rows_SB, return_inverse=True)
        entries = self._order.store.entries(ascending_N, ImagePlace._fields)
        for place_B in place_N.reshape(rows_SB.shape):
            batch = entries.take(place_B)
            columns = (batch[name].to_pylist() for name in ImagePlace._fields)
            yield [ImagePlace(*fields) for fields in zip(*columns, strict=True)]


def take_ahead(items: Iterator[_T], ahead: int, begin: Callable[[], object] | None = None) -> Generator[_T, None, None]:
    """The items of an iterator, each taken in a thread up to `ahead` items before it is asked for. The thread starts
    when the first item is asked for, and calls `begin` before it takes one."""
    pool = ThreadPoolExecutor(1, THREAD, begin)
    try:
        waiting: deque[Future[_T | None]] = deque(pool.submit(next, items, None) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


class Batches(Iterator[_T]):
    """The batches of a `training_loader`. A TrainingError in a process is raised here; for its death, see
    `explain_reader_death`. `rows_in_work` has the row that each process is reading, -1 for none."""

    def __init__(self, loader: DataLoader[_T | TrainingError], rows_in_work: np.ndarray[Any, Any]) -> None:
        self._items: Any = iter(loader)  # this starts its processes
        self._processes, self._rows = list(getattr(self._items, "_workers", ())), rows_in_work
        _started.add(self)

    def __next__(self) -> _T:
        item: _T | TrainingError = next(self._items)
        if isinstance(item, TrainingError):
            raise item
        return item

    def unfinished(self) -> list[int]:
        """The rows that processes were reading when they died."""
        ends = [process.exitcode for process in self._processes]
        return [row for row, end in zip(self._rows.tolist(), ends, strict=False) if end and row != _NO_ROW]

    def close(self) -> None:
        """End the processes."""
        _started.discard(self)
        if hasattr(self._items, "_shutdown_workers"):  # torch does it by itself only once nothing refers to them
            self._items._shutdown_workers()
        self._items = iter(())


_started: WeakSet[Batches[Any]] = WeakSet()


def training_loader(
    dataset: Dataset[_T | TrainingError], requests: Requests, workers: int, ahead: int = 4
) -> Batches[_T]:
    """The batches of a dataset that is indexed by Request, made by `workers` processes (0: by this one), each up to
    `ahead` batches before they are needed. The processes are forked, and begin at once.

    The batches are the same whatever the number of workers.
    """
    rows_in_work = np.frombuffer(mmap.mmap(-1, 8 * max(1, workers)), np.int64)  # shared with the forked processes
    rows_in_work[:] = _NO_ROW
    return Batches(
        DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            worker_init_fn=partial(_begin_worker, rows_in_work),
            multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,  # shares texts
            generator=torch.Generator(),  # or the loader would draw from the global one, and drop-path with it
        ),
        rows_in_work,
    )


@contextmanager
def explain_reader_death() -> Iterator[None]:
    """Around all that goes on while loaders are at work: turn the death of a loader process, or a batch that could not
    be handed over, into a TrainingError. Torch raises a RuntimeError for these, at any moment, or an error of the
    connection while it takes a batch."""
    try:
        try:
            yield
        except (OSError, EOFError) as error:  # torch's RuntimeError may be raised while this one is looked at
            if _remedy(error) or not _while_handing_over(error):
                raise
            raise RuntimeError(f"DataLoader worker (pid unknown) is gone: {error}") from error
    except (RuntimeError, OSError) as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        what = "a process that decodes images died" if "worker (pid" in str(error) else "a batch was not handed over"
        what += f": {str(error).splitlines()[0]}"
        if rows := sorted({row for batches in _started for row in batches.unfinished()}):
            what += f" It was reading row {', '.join(map(str, rows))}"
        raise TrainingError(what, remedy=remedy) from error


def _remedy(error: Exception) -> str | None:
    """What to do about an error of torch's loader; None for any other error."""
    text = str(error)
    if "ancdata" in text or "Too many open files" in text:
        return "this process may not open more files: raise the limit (ulimit -n 4096), or give fewer --workers"
    if "shared memory" in text or "bus error" in text.lower():
        return "make /dev/shm larger (docker run --shm-size=8g), or give fewer --workers; 0 reads without it"
    if "DataLoader worker (pid" in text:
        return "often memory: give fewer --workers, and run again"
    return None


def _while_handing_over(error: BaseException) -> bool:
    """Whether an error comes from the connection between two processes, and not from a file or a store."""
    frames = walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "multiprocessing.connection" for frame, _ in frames)


def training_error(error: DimefmError | SchemaError | OSError) -> TrainingError:
    """An error where data is read as one that can be sent to the training process."""
    if isinstance(error, OSError):
        remedy = _remedy(error) or "check its permissions and that the storage answers; the same command goes on"
        return TrainingError(f"{error.filename or 'the data'} cannot be read: {error.strerror or error}", remedy=remedy)
    if isinstance(error, SchemaError):
        return TrainingError(str(error))
    return TrainingError(error.what, remedy=error.remedy)


def note_row(row: int | None) -> None:
    """Note which row a loader process reads from now on, None for no row: if it dies, the error names it."""
    _row_in_work[0] = _NO_ROW if row is None else row


def _begin_worker(rows_in_work: np.ndarray[Any, Any], worker: int) -> None:
    """Ignore Ctrl-C, and end only some time after a SIGTERM. Both may be sent to all processes of a job; the training
    process needs its loaders until its step is done, and then ends them."""
    global _row_in_work
    _row_in_work = rows_in_work[worker : worker + 1]
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: object) -> None:
    timer = threading.Timer(_GRACE, os._exit, [0])
    timer.daemon = True
    timer.start()
