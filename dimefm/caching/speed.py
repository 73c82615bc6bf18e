"""How fast this machine reads, decodes and encodes: measured on a few rows, for --dry-run and for the number of
decoding threads that keep a GPU busy.

Shapes: N views of all images that could be read, B views in a batch, H height, W width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cache_schemas import EmbeddingStore, Status
from cache_schemas.embedding_store import Kind
from cache_schemas.plan import PlannedImage
from dimefm.caching.gpu_image_loader import open_loader
from dimefm.caching.image_loader import Known, Loaded
from dimefm.errors import RUN_AGAIN, SourceError, UnreadableError
from dimefm.images.decode import DecodeError
from dimefm.models.clip import Clip
from dimefm.system.inert_text import line

PROBE_ROWS = 256
_HEADROOM = 1.25
_TRIED = {"image": 4, "text": 32}  # rows by which `teacher_seconds` goes
_SENTENCE = "a photo of two dogs that run along a beach"


@dataclass(frozen=True)
class Rates:
    """Rows per second: `load` by one decoding thread (infinite for sentences), `teacher` on one device. `jpeg_bytes` is
    the mean size of a kept JPEG, 0 without. `failed` says how many rows have no image, and why; empty if none."""

    load: float
    teacher: float
    jpeg_bytes: float = 0.0
    failed: str = ""

    def threads_wanted(self) -> int:
        """The decoding threads that keep one device busy, with a reserve of a quarter."""
        return max(1, math.ceil(_HEADROOM * self.teacher / self.load))

    def threads(self, most: int) -> int:
        """The decoding threads to use, where there are at most `most`."""
        return min(most, self.threads_wanted())

    def bottleneck(self, threads: int) -> str | None:
        """A message if that many threads cannot feed a GPU, else None."""
        if threads * self.load >= self.teacher:
            return None
        return (
            f"bound by decoding: {threads} threads decode about {threads * self.load:,.0f} of the {self.teacher:,.0f} "
            f"images/s that the teacher takes; {self.threads_wanted()} cores for each GPU would keep it busy"
        )

    def of_worker(self, threads: int, *, shared: bool) -> float:
        """Rows per second of a worker. With `shared`, the teacher runs on the core that decodes."""
        if shared:
            return 1 / (1 / self.load + 1 / self.teacher)
        return min(threads * self.load, self.teacher)


def measure(rows: list[Any], schema: EmbeddingStore, clip: Clip, *, accept_missing: bool = False) -> Rates:
    """Measure the rates on some rows of a plan. Raises SourceError where none of them is an image, and UnreadableError
    where their files are missing, unless `accept_missing`."""
    if schema.kind == "text":
        batch = [row.text for row in rows]
        return Rates(math.inf, _rate(len(batch), lambda: clip.encode_texts(batch)))
    rows = rows[: max(1, PROBE_ROWS // (schema.views.count if schema.views else 1))]  # all are in memory at once
    near = Known(image=lambda row: rows[row % len(rows)])  # in place of the images that these would be mixed with
    loader = open_loader(schema, clip.device, accept_missing=accept_missing, known=near)
    began = time.perf_counter()
    ((loaded, pixels_N3HW),) = loader.batches(rows, len(rows), 1)
    seconds = time.perf_counter() - began
    good = [one for one in loaded if isinstance(one, Loaded)]
    bad = [(row, one) for row, one in zip(rows, loaded, strict=True) if isinstance(one, DecodeError)]
    failed = f"{len(bad):,} of the first {len(rows):,} images cannot be read: {_example(*bad[0])}" if bad else ""
    if not good:
        row, first = bad[0]
        which = "the only image cannot" if len(rows) == 1 else f"none of the first {len(rows):,} images can"
        what = f"{which} be read: {_example(row, first)}"
        if first.status == Status.MISSING and not accept_missing:
            raise UnreadableError(what, remedy=f"put them back, or mount what they are on, and {RUN_AGAIN}")
        raise SourceError(what, remedy="look at the files: is this what you mean to cache?")
    views = len(pixels_N3HW) // len(good)
    images = max(1, schema.batch_size // views)
    if not clip.compiled:  # a compiled tower computes whole batches only
        images = min(images, len(good))
    batch_B3HW = pixels_N3HW[torch.arange(images * views) % len(pixels_N3HW)]
    jpeg_bytes = sum(len(one.jpeg) for one in good if one.jpeg) / len(good)
    return Rates(len(loaded) / seconds, _rate(images, lambda: clip.encode_images(batch_B3HW)), jpeg_bytes, failed)


def teacher_seconds(kind: Kind, clip: Clip) -> float:
    """Seconds that the teacher alone takes for one image or sentence on a core, about. Nothing is read or decoded."""
    count, (height, width) = _TRIED[kind], clip.identity.preprocessing.size
    with one_thread():
        if kind == "text":
            return 1 / _rate(count, lambda: clip.encode_texts([_SENTENCE] * count))
        pixels_B3HW = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        return 1 / _rate(count, lambda: clip.encode_images(pixels_B3HW))


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which torch computes on one thread, as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _example(image: PlannedImage, error: DecodeError) -> str:
    reason = str(error)
    return line(reason if image.file in reason else f"{reason} ({image.key} in {image.file})")


def _rate(count: int, call: Any) -> float:
    """Rows per second of the second call; the first also sets things up."""
    call().cpu()
    began = time.perf_counter()
    call().cpu()
    return count / (time.perf_counter() - began)
