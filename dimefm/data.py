"""Training batches: augmented images beside their cached teacher embeddings.

Every random choice about an image is drawn from (seed, epoch, row), so that it does not depend on which process
decodes it, or on where a run was resumed.

Shapes: B images of this process, G images of all, D embedding width, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dimefm.decode import DecodeError, decode_rgb
from dimefm.errors import DimefmError, TrainingError
from dimefm.order import epoch_batches
from dimefm.preprocess import resize
from dimefm.sources.reading import read_encoded
from dimefm.store import Store
from dimefm.views import random_crop, replay


@dataclass(frozen=True)
class Request:
    """What one batch is made of."""

    step: int
    epoch: int
    rows_B: np.ndarray[Any, Any]
    all_rows_G: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """One step's input: uint8 pixels (B, 3, H, W), teacher embeddings float16 (B, D), their rows
    int64 (B,), and the rows of the global batch int64 (G,) that this is every world-th of."""

    step: int
    epoch: int
    pixels_B3HW: torch.Tensor
    teacher_BD: torch.Tensor
    rows_B: torch.Tensor
    all_rows_G: torch.Tensor

    def pin_memory(self) -> Batch:
        """Called by the loader where there is a GPU: page-locked memory is copied to it in the background."""
        return replace(self, pixels_B3HW=self.pixels_B3HW.pin_memory(), teacher_BD=self.teacher_BD.pin_memory())


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop to `size` pixels over `crop_scale` of the area, bilinear, and a horizontal flip."""

    size: int
    crop_scale: tuple[float, float]
    flip: bool
    seed: int

    def __call__(self, image_3HW: torch.Tensor, epoch: int, row: int) -> torch.Tensor:
        """The view of `row` in `epoch`, uint8 (3, size, size)."""
        rng = np.random.default_rng((self.seed, epoch, row))
        top, left, height, width = random_crop(image_3HW.shape[-2], image_3HW.shape[-1], self.crop_scale, rng)
        view = image_3HW[:, top : top + height, left : left + width]
        view = resize(view, (self.size, self.size), "bilinear")
        return view.flip(-1) if self.flip and rng.random() < 0.5 else view


class TrainingImages(Dataset["Batch | TrainingError"]):
    """Indexed by Request: reads, decodes and augments the images of a batch and gathers their embeddings.

    What goes wrong is returned, since the loader would raise it as a traceback of another process.
    """

    def __init__(self, store: str, augmentation: Augmentation) -> None:
        self._path = store
        self._augmentation = augmentation
        self._store: Store | None = None

    def __getitem__(self, request: Request) -> Batch | TrainingError:
        try:
            return self._batch(request)
        except DimefmError as error:
            return TrainingError(error.what, remedy=error.remedy)

    def _batch(self, request: Request) -> Batch:
        store = self._store = self._store or Store(self._path)  # opened in the process that reads
        images = self._images(store, request.rows_B)
        rows = request.rows_B.tolist()
        if store.schema.views:
            # Every image in another view each epoch, the same crop and flip that the teacher saw.
            view_B = (request.rows_B + request.epoch) % store.schema.views.count
            teacher_BD, boxes_B5 = store.gather_view(request.rows_B, view_B)
            size, facts = (self._augmentation.size,) * 2, store.schema.teacher.preprocessing
            pixels = [replay(image, box, size, facts) for image, box in zip(images, boxes_B5, strict=True)]
        else:
            teacher_BD = store.gather(request.rows_B)
            pixels = [self._augmentation(i, request.epoch, row) for i, row in zip(images, rows, strict=True)]
        return Batch(
            step=request.step,
            epoch=request.epoch,
            pixels_B3HW=torch.stack(pixels),
            teacher_BD=torch.from_numpy(teacher_BD),
            rows_B=torch.from_numpy(request.rows_B),
            all_rows_G=torch.from_numpy(request.all_rows_G),
        )

    def _images(self, store: Store, rows_B: np.ndarray[Any, Any]) -> list[torch.Tensor]:
        """Decoded images: the store's own pixels where it has them, else the files that it was cached from."""
        if store.schema.pixels:
            jpegs = store.pixels(rows_B)
            return [self._decode(f"row {row}", partial(next, jpegs)) for row in rows_B.tolist()]
        samples = store.samples(rows_B)
        if not all(s["file"] for s in samples):
            what = f"{store.path} was imported without the images that its embeddings are of"
            raise TrainingError(what, remedy="import it again with --images, or cache the images")
        return [
            self._decode(
                f"row {s['row']} (key {s['key']!r} in {s['file']})",
                partial(read_encoded, s["file"], s["offset"], s["size"]),
            )
            for s in samples
        ]

    def _decode(self, where: str, read: Callable[[], bytes]) -> torch.Tensor:
        try:
            return decode_rgb(read())
        except (OSError, DecodeError) as error:
            what = f"{where} was read when it was cached and cannot be read now: {error}"
            raise TrainingError(what, remedy="put the file back as it was, or cache the images again") from None


class _Requests(Sampler[Request]):
    """The batches of this rank from `first` step to the last, in order."""

    def __init__(
        self, store: Store, *, seed: int, batch_size: int, per_epoch: int, first: int, steps: int, rank: int, world: int
    ) -> None:
        self._store, self._seed, self._batch_size = store, seed, batch_size
        self._per_epoch, self._first, self._steps = per_epoch, first, steps
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[Request]:
        step = self._first
        while step < self._steps:
            epoch, skip = divmod(step, self._per_epoch)
            batches = epoch_batches(self._store, seed=self._seed, epoch=epoch, batch_size=self._batch_size, skip=skip)
            for rows in batches:
                if step >= self._steps:
                    return
                yield Request(step, epoch, rows[self._rank :: self._world].copy(), rows)
                step += 1


def training_loader(
    store: Store,
    augmentation: Augmentation,
    *,
    batch_size: int,
    per_epoch: int,
    first: int,
    steps: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Batch | TrainingError]:
    """Batches from step `first` to `steps`; `batch_size` is that of all `world` processes together.

    The same batches whatever the number of `workers` (processes that decode; 0: this one).
    """
    requests = _Requests(
        store,
        seed=augmentation.seed,
        batch_size=batch_size,
        per_epoch=per_epoch,
        first=first,
        steps=steps,
        rank=rank,
        world=world,
    )
    return DataLoader(
        TrainingImages(store.path, augmentation),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one, and drop-path with it
    )


def batches(loader: DataLoader[Batch | TrainingError]) -> Iterator[Batch]:
    """The batches of a loader. Raises TrainingError for what went wrong in a worker, or with it."""
    iterator = iter(loader)
    while True:
        try:
            item = next(iterator, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            what = f"a process that decodes images died: {str(error).splitlines()[0]}"
            raise TrainingError(what, remedy="often memory: give fewer --workers, and run again") from error
        if item is None:
            return
        if isinstance(item, TrainingError):
            raise item
        yield item


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
