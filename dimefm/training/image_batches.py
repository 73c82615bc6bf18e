"""Image batches: augmented images beside their cached teacher embeddings, and the texts of the step.

Every random choice about an image is drawn from (seed, epoch, row), so that it depends neither on the process that
decodes it nor on where a run was resumed. With several stores, each counts its own passes in place of epochs.

Shapes: B images of this process, G images of all, D embedding width, P numbers of a view, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from cache_schemas import SchemaError, StrongViews, ViewPlan
from dimefm.errors import DimefmError, TrainingError
from dimefm.images.crops import draw_operations, random_crop, replay, with_operations
from dimefm.images.decode import DecodeError, decode_rgb, decode_scaled, jpeg_size
from dimefm.images.preprocess import resize
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store, opened
from dimefm.system.read_ahead import reading_ahead
from dimefm.training.batch_loader import Request, note_row, training_error
from dimefm.training.text_bank import DrawnTexts, TextBank

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class Batch:
    """One step's images: uint8 pixels (B, 3, H, W) and teacher embeddings as stored (B, D), those of several teachers
    side by side. They are every world-th image of the global batch, of which `all_rows_G` are the rows (int64) and
    `texts` what was drawn for it, for each teacher; None for one that needs no sentences."""

    step: int
    epoch: int
    pixels_B3HW: torch.Tensor
    teacher_BD: torch.Tensor
    all_rows_G: torch.Tensor
    texts: tuple[DrawnTexts | None, ...] = ()

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which it can be copied to a GPU in the background."""
        pixels_B3HW, teacher_BD = self.pixels_B3HW.pin_memory(), self.teacher_BD.pin_memory()
        texts = tuple(drawn and drawn.pin_memory() for drawn in self.texts)
        return replace(self, pixels_B3HW=pixels_B3HW, teacher_BD=teacher_BD, texts=texts)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop to `size` pixels over `crop_scale` of the area, bilinear, and a horizontal flip; then what
    `strong` says, as it is done to views."""

    size: int
    crop_scale: tuple[float, float]
    flip: bool
    seed: int
    strong: StrongViews | None = None

    def __call__(self, data: bytes, epoch: int, row: int) -> torch.Tensor:
        """The crop of an encoded image for `row` in `epoch`, uint8 (3, size, size). Raises DecodeError.

        A JPEG is decoded no larger than needed: at the smallest n/8 of its size at which the crop still has `size`
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
        view = view.flip(-1) if self.flip and rng.random() < 0.5 else view
        return with_operations(view, draw_operations(self.strong, rng)) if self.strong else view


def _scaled(
    box: tuple[int, int, int, int], whole: tuple[int, int], image_3HW: torch.Tensor
) -> tuple[int, int, int, int]:
    """The box of a crop of the whole image, in the pixels of a smaller copy."""
    down, across = image_3HW.shape[-2] / whole[0], image_3HW.shape[-1] / whole[1]
    top, left = int(box[0] * down), int(box[1] * across)
    return top, left, max(1, round(box[2] * down)), max(1, round(box[3] * across))


class TrainingImages(Dataset["Batch | TrainingError"]):
    """Indexed by Request: reads, decodes and augments the images of a batch, gathers their embeddings, draws texts from
    the `banks` of the teachers. `more` are the stores of further teachers.

    An error is returned, not raised: torch's loader would show it as the traceback of another process.
    """

    def __init__(
        self,
        store: Store | str,
        augmentation: Augmentation,
        banks: Sequence[TextBank | None] = (),
        more: Sequence[Store] = (),
    ) -> None:
        self._given, self._augmentation, self._banks = [store, *more], augmentation, banks
        self._stores: list[Store] = []

    def __getitem__(self, request: Request) -> Batch | TrainingError:
        try:
            return self._batch(request)
        except (DimefmError, SchemaError, OSError) as error:
            return training_error(error)

    def _batch(self, request: Request) -> Batch:
        stores = self._stores = self._stores or [opened(one) for one in self._given]  # in the process that reads
        store = stores[0]
        view: Callable[[int, bytes], torch.Tensor]
        if plan := store.schema.views:
            # Every pass shows another view of each image: the same pixels that each teacher saw, at this size
            count = min(one.schema.views.count for one in stores if one.schema.views)
            teacher_BD, numbers_BP = _gather_view(stores, request.rows_B, (request.rows_B + request.passes()) % count)
            size, facts = (self._augmentation.size,) * 2, store.schema.teacher.preprocessing
            other = self._mixed_in(store, plan, numbers_BP)

            def view(place: int, data: bytes) -> torch.Tensor:
                return replay(decode_rgb(data), numbers_BP[place], plan, size, facts, other)
        else:
            teacher_BD = _beside([one.gather(request.rows_B) for one in stores])
            passes_B = request.passes()

            def view(place: int, data: bytes) -> torch.Tensor:
                return self._augmentation(data, int(passes_B[place]), int(request.rows_B[place]))

        pixels_B3HW = _empty_pixels(len(request.rows_B), self._augmentation.size)
        for place, (where, read) in enumerate(self._encoded(store, request.rows_B, request.places_B)):
            note_row(request.rows_B[place])
            pixels_B3HW[place] = _read_again(where, read, partial(view, place))
        note_row(None)
        return Batch(
            step=request.step,
            epoch=request.epoch,
            pixels_B3HW=pixels_B3HW,
            teacher_BD=torch.from_numpy(teacher_BD),
            all_rows_G=torch.from_numpy(request.all_rows_G),
            texts=tuple(bank.draw(request.step, request.all_rows_G) if bank else None for bank in self._banks),
        )

    def _mixed_in(
        self, store: Store, plan: ViewPlan, numbers_BP: np.ndarray[Any, Any]
    ) -> Callable[[int], torch.Tensor]:
        """Gives the images of the rows that these views are mixed with, uint8 (3, H, W). They are read here, and
        decoded when they are asked for."""
        rows_N = np.unique(numbers_BP[:, plan.alone]) if plan.mixup else np.empty(0, np.int64)
        rows_N = rows_N[rows_N >= 0].astype(np.int64)
        places_N = None
        if not store.schema.pixels:
            samples = store.samples(rows_N, ImagePlace._fields)
            places_N = [ImagePlace(**{name: one[name] for name in ImagePlace._fields}) for one in samples]
        encoded = zip(rows_N.tolist(), self._encoded(store, rows_N, places_N), strict=True)
        found = {row: (where, _read_again(where, read, bytes)) for row, (where, read) in encoded}

        def other(row: int) -> torch.Tensor:
            where, data = found[row]
            return _read_again(where, lambda: data, decode_rgb)

        return other

    def _encoded(
        self, store: Store, rows_N: np.ndarray[Any, Any], places_N: list[ImagePlace] | None
    ) -> Iterator[tuple[Callable[[], str], Callable[[], bytes]]]:
        """How to name each image in an error, and how to read it: from the store's own pixels, else from the file that
        it was cached from."""
        if places_N is None:
            jpegs = store.pixels(rows_N)
            for row in rows_N.tolist():
                yield partial(store.name_of, row), partial(next, jpegs)
            return
        if not all(place.file for place in places_N):
            what = f"{store.path} was imported without the images that its embeddings are of"
            raise TrainingError(what, remedy="import it again with --images, or cache the images")
        images = reading_ahead(read_encoded, places_N, places_N[0].file if places_N else "")
        for row in rows_N.tolist():
            yield partial(_name_of, store, row), partial(next, images)


def _gather_view(
    stores: Sequence[Store], rows_B: np.ndarray[Any, Any], view_B: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The embeddings (B, D) of one view of each row, those of all stores side by side, and its numbers (B, P)."""
    found = [store.gather_view(rows_B, view_B) for store in stores]
    numbers_BP = found[0][1]
    for store, (_, theirs_BP) in zip(stores, found, strict=True):
        if not np.array_equal(numbers_BP, theirs_BP):
            what = f"{stores[0].path} and {store.path} have other views of the same images"
            raise TrainingError(what, remedy="cache both from the same images, with the same --pixels and --decoder")
    return _beside([embedding_BD for embedding_BD, _ in found]), numbers_BP


def _beside(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _empty_pixels(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size). In a loader process it is in shared memory, so that it need not be copied."""
    if get_worker_info() is None:
        return torch.empty((count, 3, size, size), dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * 3 * size * size)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, 3, size, size)


def _name_of(store: Store, row: int) -> str:
    (sample,) = store.samples(np.array([row]))
    return f"{store.name_of(row)} (key {sample['key']!r} in {sample['file']})"


def _read_again(where: Callable[[], str], read: Callable[[], bytes], view: Callable[[bytes], _Seen]) -> _Seen:
    try:
        return view(read())
    except (OSError, DecodeError, MemoryError) as error:
        what = f"{where()} was read when it was cached and cannot be read now: {error}"
        raise TrainingError(what, remedy="put the file back as it was, or cache the images again") from None
