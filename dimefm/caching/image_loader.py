"""From a planned image to what the teacher sees and what is stored beside its embedding.

Shapes: B images in a batch, V views (1 without), P numbers of a view, H height, W width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from cache_schemas import EmbeddingStore, Status, ViewPlan
from cache_schemas.plan import PlannedImage
from cache_schemas.views import MIXUP, ONE
from dimefm.images.crops import draw_mixup, draw_view, draw_views, replay
from dimefm.images.decode import DecodeError, decode_rgb, to_tensor
from dimefm.images.preprocess import Preprocess
from dimefm.images.small_jpeg import small_jpeg
from dimefm.sources.read_image import read_image
from dimefm.system.read_ahead import reading_ahead

_TASK = 8  # images per task of the thread pool: a task for one image costs as much as reading it
_AHEAD = 2  # batches that are decoded before they are needed
MEMORY_RAN_OUT = "memory ran out"
"""How the reason begins where an image is TOO_LARGE for this machine, and not above our limits."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Loaded:
    """uint8 (V, 3, H, W) for the teacher; with views their numbers int32 (V, P); with pixels the JPEG to keep."""

    pixels_V3HW: torch.Tensor
    views_VP: np.ndarray[Any, Any] | None = None
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Known:
    """What a loader of views may be told about rows. `image`: where the image of a row is that others are mixed with;
    without it none is mixed. `views`: the numbers of a row's views, int32 (V, P), instead of drawing them."""

    image: Callable[[int], PlannedImage] | None = None
    views: Callable[[int], np.ndarray[Any, Any]] | None = None


NOTHING_KNOWN = Known()


class Loader:
    """Reads and decodes the images of a store's plan. Safe in threads."""

    def __init__(self, schema: EmbeddingStore, *, accept_missing: bool = False, known: Known = NOTHING_KNOWN) -> None:
        """`accept_missing`: see sources.read_image."""
        self._read = partial(read_planned_image, accept_missing=accept_missing)
        self._views, self._side, self._known, self._schema = schema.views, schema.pixels, known, schema
        self._preprocess = Preprocess(schema.teacher.preprocessing, exact=schema.decoder == "pillow")

    def load(self, image: PlannedImage) -> Loaded | DecodeError:
        """One image, or why there is none. Raises UnreadableError where the storage does not answer."""
        return self._decoded(image, self._read(image))

    def _decoded(self, image: PlannedImage, data: bytes | DecodeError) -> Loaded | DecodeError:
        return data if isinstance(data, DecodeError) else or_reason(lambda: self._decode(data, image.row))

    def batches(
        self, images: list[PlannedImage], size: int, threads: int, *, pin: bool = False
    ) -> Iterator[tuple[list[Loaded | DecodeError], torch.Tensor]]:
        """Batches of `size` images, decoded on threads ahead of need: what became of each image, and the pixels of all
        views of those that could be read, uint8 (B V, 3, H, W), with `pin` in page-locked memory.

        The pixels are overwritten once two more batches have been asked for. Raises as `load` does.
        """
        parts = [images[at : at + size] for at in range(0, len(images), size)]
        shape = (self._views.count if self._views else 1, 3, *self._preprocess.facts.size)
        buffers = [
            torch.empty((len(parts[0]), *shape), dtype=torch.uint8, pin_memory=pin)
            for _ in range(min(len(parts), _AHEAD + 1))
        ]
        waiting: deque[list[Future[list[Loaded | DecodeError]]]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for number in range(-_AHEAD, len(parts)):
                if number >= 0:
                    loaded = [one for task in waiting.popleft() for one in task.result()]
                    pixels_BV3HW = buffers[number % len(buffers)][: len(loaded)]
                    good = [place for place, one in enumerate(loaded) if isinstance(one, Loaded)]
                    yield loaded, (pixels_BV3HW if len(good) == len(loaded) else pixels_BV3HW[good]).flatten(0, 1)
                if number + _AHEAD < len(parts):
                    part = parts[number + _AHEAD]
                    buffer = buffers[(number + _AHEAD) % len(buffers)][: len(part)]
                    tasks = [(part[at : at + _TASK], buffer[at : at + _TASK]) for at in range(0, len(part), _TASK)]
                    waiting.append([pool.submit(self._load_some, *task) for task in tasks])
        finally:
            pool.shutdown(cancel_futures=True)

    def _load_some(self, images: list[PlannedImage], places_BV3HW: torch.Tensor) -> list[Loaded | DecodeError]:
        """Load images, with their pixels written to their places in the batch."""
        found: list[Loaded | DecodeError] = []
        datas = reading_ahead(self._read, images, images[0].file)
        for image, data, place_V3HW in zip(images, datas, places_BV3HW, strict=True):
            loaded = self._decoded(image, data)
            if isinstance(loaded, Loaded):
                loaded = replace(loaded, pixels_V3HW=place_V3HW.copy_(loaded.pixels_V3HW))
            found.append(loaded)
        return found

    def _decode(self, data: bytes, row: int) -> Loaded:
        image = self._preprocess.decode(data)
        jpeg = small_jpeg(data, image, self._side) if self._side else None
        if not self._views:
            return Loaded(self._preprocess.apply(image)[None], None, jpeg)
        image_3HW, facts, other = _as_trained(data, image, jpeg), self._preprocess.facts, cache(self._other_image)
        views_VP = self._known.views(row) if self._known.views else self._draw(self._views, row, image_3HW, other)
        pixels = [replay(image_3HW, one_P, self._views, facts.size, facts, other) for one_P in views_VP]
        return Loaded(torch.stack(pixels), views_VP, jpeg)

    def _draw(
        self, plan: ViewPlan, row: int, image_3HW: torch.Tensor, other: Callable[[int], torch.Tensor]
    ) -> np.ndarray[Any, Any]:
        """The numbers of the views of a row, int32 (V, P). A view that would be mixed with an image that cannot be read
        is not mixed."""
        views_VP = np.zeros((plan.count, plan.numbers), np.int32)
        views_VP[:, : plan.alone] = draw_views(plan, row, *image_3HW.shape[-2:])
        if not plan.mixup:
            return views_VP
        views_VP[:, plan.alone : plan.alone + MIXUP] = (-1, ONE)
        shard = self._schema.shard_range(row // self._schema.shard_rows)
        for view, numbers_P in enumerate(views_VP, plan.first):
            partner, share = draw_mixup(plan, row, view, *shard)
            if partner >= 0 and self._known.image:
                with suppress(DecodeError):
                    mixed_in_P = draw_view(plan, partner, view, *other(partner).shape[-2:])
                    numbers_P[plan.alone :] = (partner, share, *mixed_in_P)
        return views_VP

    def _other_image(self, row: int) -> torch.Tensor:
        """The image of another row, as it is for that row, uint8 (3, H, W). Raises DecodeError."""
        assert self._known.image is not None
        data = self._read(self._known.image(row))
        if isinstance(data, DecodeError):
            raise data
        image = self._preprocess.decode(data)
        return _as_trained(data, image, small_jpeg(data, image, self._side) if self._side else None)


def _as_trained(data: bytes, image: torch.Tensor | Image.Image, jpeg: bytes | None) -> torch.Tensor:
    """What the trainer will decode, on which views are drawn: the kept JPEG, where there is one."""
    if jpeg is not None and jpeg is not data:
        return decode_rgb(jpeg)
    return image if isinstance(image, torch.Tensor) else to_tensor(image)


def read_planned_image(image: PlannedImage, *, accept_missing: bool = False) -> bytes | DecodeError:
    """`sources.read_image` for stage 1: CRASHED without reading it, where caching.crashing_images has found that."""
    if image.crash is not None:
        return DecodeError(Status.CRASHED, image.crash)
    return or_reason(lambda: read_image(image, accept_missing=accept_missing))


def or_reason(work: Callable[[], _Result]) -> _Result | DecodeError:
    """What `work` gives, which reads or decodes an image; or why there is none, such as too little memory for it."""
    try:
        return work()
    except DecodeError as error:
        return error
    except MemoryError as error:
        found = DecodeError(Status.TOO_LARGE, f"{MEMORY_RAN_OUT} while it was decoded")
        found.__cause__ = error
        return found
