"""Training batches: augmented images beside their cached teacher embeddings, and the texts of the step.

Every random choice about an image is drawn from (seed, epoch, row), so that it does not depend on which process
decodes it, or on where a run was resumed.

Shapes: B images of this process, G images of all, T texts, D embedding width, H height, W width.
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
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from multiprocessing import get_all_start_methods
from traceback import walk_tb
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cache_schemas import SchemaError
from dimefm.errors import DimefmError, TrainingError
from dimefm.images.crops import random_crop, replay
from dimefm.images.decode import DecodeError, decode_rgb, decode_scaled, jpeg_size
from dimefm.images.preprocess import resize
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store
from dimefm.system.read_ahead import reading_ahead
from dimefm.training.row_order import Order
from dimefm.training.text_bank import DrawnTexts, TextBank

THREAD = "read-ahead"
"""How the names of threads begin that take items ahead of time: none may be at work while a process is forked."""

_T = TypeVar("_T")
_NONE = -1
_reading = np.array([_NONE])  # in a process of the loader's: the row that it reads, where the training process sees it
_GRACE = 30.0  # seconds that a loader's process goes on after SIGTERM
_IMAGES_AHEAD = 2**18  # ten seconds of a GPU and a small student: the plans of a window are read in a few


@dataclass(frozen=True)
class Request:
    """What one batch is made of; `places_B` says where each image is, if it is read from its own file.

    The first request of a window says the rows of all its batches, `window_N`, where plans are read by the dataset.
    """

    step: int
    epoch: int
    rows_B: np.ndarray[Any, Any]
    all_rows_G: np.ndarray[Any, Any]
    places_B: list[ImagePlace] | None = None
    window_N: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Batch:
    """One step's images: uint8 pixels (B, 3, H, W), teacher embeddings as stored (B, D); and of the global batch,
    that this is every world-th image of, the rows int64 (G,) and the texts drawn for it."""

    step: int
    epoch: int
    pixels_B3HW: torch.Tensor
    teacher_BD: torch.Tensor
    all_rows_G: torch.Tensor
    texts: DrawnTexts | None = None

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which is copied to a GPU in the background."""
        pixels_B3HW, teacher_BD = self.pixels_B3HW.pin_memory(), self.teacher_BD.pin_memory()
        texts = self.texts.pin_memory() if self.texts else None
        return replace(self, pixels_B3HW=pixels_B3HW, teacher_BD=teacher_BD, texts=texts)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop to `size` pixels over `crop_scale` of the area, bilinear, and a horizontal flip."""

    size: int
    crop_scale: tuple[float, float]
    flip: bool
    seed: int

    def __call__(self, data: bytes, epoch: int, row: int) -> torch.Tensor:
        """The view of `row` in `epoch`, uint8 (3, size, size), of an encoded image. Raises DecodeError.

        A JPEG is decoded no larger than the crop needs: at the smallest n/8 of its size that leaves the crop `size`
        pixels or more.
        """
        rng = np.random.default_rng((self.seed, epoch, row))
        whole = jpeg_size(data)
        if whole is None:
            image = decode_rgb(data)
            whole = image.shape[-2], image.shape[-1]
            box = random_crop(*whole, self.crop_scale, rng)
        else:
            box = random_crop(*whole, self.crop_scale, rng)
            image = decode_scaled(data, whole, min(1.0, self.size / min(box[2:])))
        top, left, height, width = _scaled(box, whole, image)
        view = image[:, top : top + height, left : left + width]
        view = resize(view, (self.size, self.size), "bilinear")
        return view.flip(-1) if self.flip and rng.random() < 0.5 else view


def _scaled(
    box: tuple[int, int, int, int], whole: tuple[int, int], image_3HW: torch.Tensor
) -> tuple[int, int, int, int]:
    """A crop of the whole image as one of an image that is smaller."""
    down, across = image_3HW.shape[-2] / whole[0], image_3HW.shape[-1] / whole[1]
    top, left = int(box[0] * down), int(box[1] * across)
    return top, left, max(1, round(box[2] * down)), max(1, round(box[3] * across))


class TrainingImages(Dataset["Batch | TrainingError"]):
    """Indexed by Request: reads, decodes and augments the images of a batch, gathers their embeddings, draws texts.

    What goes wrong is returned, since the loader would raise it as a traceback of another process.
    """

    def __init__(self, store: str, augmentation: Augmentation, bank: TextBank | None = None) -> None:
        self._path, self._augmentation, self._bank = store, augmentation, bank
        self._store: Store | None = None

    def __getitem__(self, request: Request) -> Batch | TrainingError:
        try:
            return self._batch(request)
        except (DimefmError, SchemaError, OSError) as error:
            return training_error(error)

    def _batch(self, request: Request) -> Batch:
        store = self._store = self._store or Store(self._path)  # opened in the process that reads
        view: Callable[[int, bytes], torch.Tensor]
        if store.schema.views:
            # Every image in another view each epoch, the same crop and flip that the teacher saw.
            view_B = (request.rows_B + request.epoch) % store.schema.views.count
            teacher_BD, boxes_B5 = store.gather_view(request.rows_B, view_B)
            size, facts = (self._augmentation.size,) * 2, store.schema.teacher.preprocessing

            def view(place: int, data: bytes) -> torch.Tensor:
                return replay(decode_rgb(data), boxes_B5[place], size, facts)
        else:
            teacher_BD = store.gather(request.rows_B)

            def view(place: int, data: bytes) -> torch.Tensor:
                return self._augmentation(data, request.epoch, int(request.rows_B[place]))

        pixels_B3HW = _empty_pixels(len(request.rows_B), self._augmentation.size)
        for place, (where, read) in enumerate(self._encoded(store, request)):
            _reading[0] = request.rows_B[place]
            pixels_B3HW[place] = _readable(where, read, partial(view, place))
        _reading[0] = _NONE
        return Batch(
            step=request.step,
            epoch=request.epoch,
            pixels_B3HW=pixels_B3HW,
            teacher_BD=torch.from_numpy(teacher_BD),
            all_rows_G=torch.from_numpy(request.all_rows_G),
            texts=self._bank.draw(request.step, request.all_rows_G) if self._bank else None,
        )

    def _encoded(self, store: Store, request: Request) -> Iterator[tuple[Callable[[], str], Callable[[], bytes]]]:
        """How each image is called and read: from the store's own pixels, else the files that it was cached from."""
        if request.places_B is None:
            jpegs = store.pixels(request.rows_B)
            for row in request.rows_B.tolist():
                yield partial("row {}".format, row), partial(next, jpegs)
            return
        if not all(place.file for place in request.places_B):
            what = f"{store.path} was imported without the images that its embeddings are of"
            raise TrainingError(what, remedy="import it again with --images, or cache the images")
        images = reading_ahead(read_encoded, request.places_B, request.places_B[0].file)
        for row in request.rows_B.tolist():
            yield partial(_called, store, row), partial(next, images)


def _empty_pixels(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size); in a process of the loader's in shared memory, from where it need not be copied."""
    if get_worker_info() is None:
        return torch.empty((count, 3, size, size), dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * 3 * size * size)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, 3, size, size)


def _called(store: Store, row: int) -> str:
    (sample,) = store.samples(np.array([row]))
    return f"row {row} (key {sample['key']!r} in {sample['file']})"


def _readable(
    where: Callable[[], str], read: Callable[[], bytes], view: Callable[[bytes], torch.Tensor]
) -> torch.Tensor:
    try:
        return view(read())
    except (OSError, DecodeError, MemoryError) as error:
        what = f"{where()} was read when it was cached and cannot be read now: {error}"
        raise TrainingError(what, remedy="put the file back as it was, or cache the images again") from None


class Requests(Sampler[Request]):
    """The batches of one process of `world`, from step `first` to the last, in order.

    Those of images that are read from their own files are made in a thread ahead of time: at the beginning of a window
    the plans of all its shards are read, here for all loader processes.
    """

    def __init__(self, order: Order, *, first: int, steps: int, rank: int = 0, world: int = 1) -> None:
        self._order, self._first, self._steps, self._rank, self._world = order, first, steps, rank, world
        schema = order.store.schema
        self._placed, self._is_text = schema.kind == "image" and not schema.pixels, schema.kind == "text"

    def __iter__(self) -> Iterator[Request]:
        ahead = max(16, _IMAGES_AHEAD * self._world // self._order.batch_size)
        return read_ahead(self._made(), ahead) if self._placed else self._made()

    def _made(self) -> Iterator[Request]:
        for first, epoch, rows_SG in self._order.windows(self._first, self._steps):
            rows_SB = np.ascontiguousarray(rows_SG[:, self._rank :: self._world])
            places = self._places(rows_SB) if self._placed else repeat(None)
            window_N = rows_SB.ravel() if self._is_text else None
            for step, (rows_G, rows_B, places_B) in enumerate(zip(rows_SG, rows_SB, places, strict=False), first):
                yield Request(step, epoch, rows_B, rows_G, places_B, window_N)
                window_N = None

    def _places(self, rows_SB: np.ndarray[Any, Any]) -> Iterator[list[ImagePlace]]:
        ascending_N, place_N = np.unique(rows_SB, return_inverse=True)
        entries = self._order.store.entries(ascending_N, ImagePlace._fields)
        for place_B in place_N.reshape(rows_SB.shape):
            batch = entries.take(place_B)
            columns = (batch[name].to_pylist() for name in ImagePlace._fields)
            yield [ImagePlace(*fields) for fields in zip(*columns, strict=True)]


def read_ahead(items: Iterator[_T], ahead: int, begin: Callable[[], object] | None = None) -> Generator[_T, None, None]:
    """The items of an iterator, each taken in a thread up to `ahead` items before it is asked for. The thread starts
    when the first is asked for, and calls `begin` first."""
    pool = ThreadPoolExecutor(1, THREAD, begin)
    try:
        waiting: deque[Future[_T | None]] = deque(pool.submit(next, items, None) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


class Batches(Iterator[_T]):
    """What `training_loader` gives. Raises TrainingError for what went wrong in a process; see also
    `explain_reader_death`. `reading` holds the row that each process reads, -1 where it reads none."""

    def __init__(self, loader: DataLoader[_T | TrainingError], reading: np.ndarray[Any, Any]) -> None:
        self._items: Any = iter(loader)  # its processes are started
        self._processes, self._rows = list(getattr(self._items, "_workers", ())), reading
        _started.add(self)

    def __next__(self) -> _T:
        item: _T | TrainingError = next(self._items)
        if isinstance(item, TrainingError):
            raise item
        return item

    def unfinished(self) -> list[int]:
        """The rows that processes were reading when they died."""
        ends = [process.exitcode for process in self._processes]
        return [row for row, end in zip(self._rows.tolist(), ends, strict=False) if end and row != _NONE]

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
    """The batches of a dataset that is indexed by Request, read by `workers` processes (0: by this one), each `ahead`
    batches before they are needed. The processes are forked and begin to read at once.

    The batches are the same whatever the number of workers.
    """
    reading = np.frombuffer(mmap.mmap(-1, 8 * max(1, workers)), np.int64)  # shared with the processes that are forked
    reading[:] = _NONE
    return Batches(
        DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            worker_init_fn=partial(_begin_worker, reading),
            multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,  # shares texts
            generator=torch.Generator(),  # or the loader would draw from the global one, and drop-path with it
        ),
        reading,
    )


@contextmanager
def explain_reader_death() -> Iterator[None]:
    """Around all that goes on while loaders are at work: torch tells of a process of theirs that died, or of a batch
    that could not be handed over, by a RuntimeError at any moment, or is cut off while it takes a batch; any of these
    becomes a TrainingError."""
    try:
        try:
            yield
        except (OSError, EOFError) as error:  # what torch tells may come while this is looked at
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
    """What to do about an error of torch's loader, None where it is none."""
    text = str(error)
    if "ancdata" in text or "Too many open files" in text:
        return "this process may not open more files: raise the limit (ulimit -n 4096), or give fewer --workers"
    if "shared memory" in text or "bus error" in text.lower():
        return "make /dev/shm larger (docker run --shm-size=8g), or give fewer --workers; 0 reads without it"
    if "DataLoader worker (pid" in text:
        return "often memory: give fewer --workers, and run again"
    return None


def _while_handing_over(error: BaseException) -> bool:
    """Whether an error is of the connection between two processes: of no file of ours, and no store."""
    frames = walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "multiprocessing.connection" for frame, _ in frames)


def training_error(error: DimefmError | SchemaError | OSError) -> TrainingError:
    """What went wrong where data is read, as it can be sent to the process that trains."""
    if isinstance(error, OSError):
        remedy = _remedy(error) or "check its permissions and that the storage answers; the same command goes on"
        return TrainingError(f"{error.filename or 'the data'} cannot be read: {error.strerror or error}", remedy=remedy)
    if isinstance(error, SchemaError):
        return TrainingError(str(error))
    return TrainingError(error.what, remedy=error.remedy)


def _begin_worker(reading: np.ndarray[Any, Any], worker: int) -> None:
    """Ctrl-C, and SIGTERM to all processes of a job, are for the training process, which needs the others until its
    step is done and then lets them end."""
    global _reading
    _reading = reading[worker : worker + 1]
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: object) -> None:
    timer = threading.Timer(_GRACE, os._exit, [0])
    timer.daemon = True
    timer.start()
