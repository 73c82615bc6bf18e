"""Stage 1 over images, against what bounds it: the bare forward pass, that against the peak of matrix products, and the
decoding of JPEGs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle, islice
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.gpu_decoding import nvjpeg
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import peak, seconds
from cache_schemas import EmbeddingStore
from cache_schemas.identity import Precision
from cache_schemas.plan import PlannedImage, planned_rows
from dimefm.caching import image_loader
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.image_loader import Loader
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.models.clip import Clip, teacher_precision
from dimefm.models.flops import flops_of
from dimefm.store.embedding_store import Store
from dimefm.system.machine import cpus
from dimefm.system.matrix_products import DTYPES

_CPU = torch.device("cpu")
_TASK = 8  # images that a decoding thread takes at once, as in stage 1
_ALONE = 30  # repeats of a batch of one
_SHORT = 4  # of the two runs whose difference is the steady state, the short one is a fourth of the long one
Rows = list[PlannedImage]


def images(kit: Kit) -> None:
    """The shard's own code at the batch of cache-images, then what it consists of and what else could be chosen."""
    precision, batch, cores = teacher_precision(kit.device.type), kit.sizes.batch, cpus()
    clip = kit.inputs.teacher(precision, kit.device)
    request = PlanRequest(kind="image", arguments=(str(kit.inputs.tar()),), batch_size=batch)
    store = open_or_plan(request, str(kit.inputs.folder / "stage1.zarr"), clip.identity)
    rows, schema = entries(store), store.schema
    tower = Tower(kit, clip.model.visual, clip.identity.preprocessing.size)
    held = str(tower.dtype).removeprefix("torch.")
    what = f"{kit.sizes.name}, {precision} products, {held} weights"
    kit.line("work of the image tower", tower.flops / 1e9, "GFLOP an image", what)
    bare = {size: tower.rate(precision, size) for size in kit.sizes.batches}
    for size, rate in bare.items():
        at = f"{what}, batch {size}: {tower.share(rate, precision):.0%} of the peak"
        kit.line("bare forward", rate, "images/s", at)
    kit.line("latency of one image", tower.latency(precision), "ms", f"{what}, from pixels on the device")
    best, product = max(bare.values()), f"{peak(kit, precision) / 1e12:,.0f} TFLOP/s"
    at = f"{what}, at the best batch; products reach {product}"
    kit.bar("bare forward against the measured peak", tower.share(best, precision), "", at, least=0.5)

    # A card under load for seconds is slower than one that has rested: the bare forward is as long, before and after.
    at, long = f"{what}, batch {batch}, {cores} decoding threads", max(3, kit.sizes.encoded // batch // 4)
    own = tower.rate(precision, batch, long)
    with undecoded(rows, schema):
        fed = steady(rows, schema, clip, cores, kit.sizes.encoded)
    kit.line("stage 1, images in memory", fed, "images/s", at)
    own = (own + tower.rate(precision, batch, long)) / 2
    kit.line("bare forward, as long", own, "images/s", f"{what}, batch {batch}")
    kit.bar("stage 1 against the bare forward, images in memory", fed / own, "", at, least=0.95)
    whole = steady(rows, schema, clip, cores, kit.sizes.encoded)
    kit.rate("teacher_images_per_second", whole)
    kit.line("stage 1, JPEGs of 500 x 375", whole, "images/s", at)
    kit.bar("stage 1 against the bare forward, decoding too", whole / own, "", at, least=0.95)
    _decoding(kit, rows, schema, best)
    if kit.enough(6 + kit.sizes.compile_seconds, "nvJPEG, before --compile"):
        nvjpeg(kit, clip, rows, schema)
    _other_weights(kit, clip, tower)
    for size in kit.sizes.batches:
        if size != batch and kit.enough(12 + kit.sizes.compile_seconds, f"stage 1 at batch {size}, before --compile"):
            with undecoded(rows, schema):
                rate = steady(rows, replace(schema, batch_size=size), clip, cores, kit.sizes.encoded)
            at = f"{what}, batch {size}: {rate / bare[size]:.3f} of the bare forward"
            kit.line("stage 1, images in memory", rate, "images/s", at)
    if kit.enough_to_compile():
        _compiled(kit, clip, rows, schema, own)
    if kit.device.type == "cuda" and kit.enough_to_compile():
        tower.module = torch.compile(tower.module, mode="reduce-overhead", dynamic=False)
        rate = tower.rate(precision, batch)
        kit.line("bare forward compiled, as one CUDA graph", rate, "images/s", f"{rate / bare[batch]:.3f} of eager")


@dataclass
class Tower:
    """An image tower with nothing around it, for images of `size` (height, width)."""

    kit: Kit
    module: Any
    size: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return next(self.module.parameters()).dtype  # type: ignore[no-any-return]

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of one image, counted as it goes through."""
        image = torch.randn(1, 3, *self.size, device=self.kit.device, dtype=self.dtype)
        with torch.no_grad():
            return float(flops_of(lambda: self.module(image)))

    def rate(self, precision: str, batch: int, repeats: int = 3) -> float:
        """Images/s on normalised images that are on the device; under autocast, unless its weights are of that
        precision."""
        return batch / seconds([self._forward(precision, batch) for _ in range(2)], self.kit.device, repeats)

    def latency(self, precision: str) -> float:
        """Milliseconds of one image alone, likewise."""
        return 1000 * seconds([self._forward(precision, 1)], self.kit.device, _ALONE)

    def _forward(self, precision: str, batch: int) -> Callable[[], None]:
        wanted, held = DTYPES[precision], self.dtype
        images = torch.randn(batch, 3, *self.size, device=self.kit.device, dtype=held)

        def forward() -> None:
            with torch.inference_mode(), torch.autocast(self.kit.device.type, wanted, enabled=held != wanted):
                self.module(images)

        return forward

    def share(self, rate: float, precision: str) -> float:
        """What so many images/s are of the peak of products in that precision."""
        return rate * self.flops / peak(self.kit, precision)


def entries(store: Store) -> Rows:
    """All of a store's plan."""
    return [row for shard in range(store.schema.shards) for row in planned_rows(store.plan(shard))]


def steady(rows: Rows, schema: EmbeddingStore, clip: Clip, threads: int, count: int) -> float:
    """Images/s of encode_rows over `count` images in full swing: a shorter run is taken off, whose beginning and end
    are the same."""
    long = list(islice(cycle(rows), count))
    short = long[: count // _SHORT]

    def run(part: Rows) -> float:
        began = time.perf_counter()
        encode_rows(part, schema, clip, threads=threads)
        return time.perf_counter() - began

    run(short[: 2 * schema.batch_size])
    return (len(long) - len(short)) / max(1e-9, run(long) - run(short))


@contextmanager
def undecoded(rows: Rows, schema: EmbeddingStore) -> Iterator[None]:
    """For the block, images come decoded from memory instead of a file: all else of stage 1 is as it is."""
    loader = Loader(schema)
    kept = [loader.load(row) for row in rows[:64]]
    calls = 0

    def decoded(self: Loader, image: PlannedImage, data: Any) -> Any:
        nonlocal calls
        calls += 1
        return kept[image.row % len(kept)]

    nothing_read = mock.patch.object(image_loader, "read_planned_image", return_value=b"")
    with nothing_read, mock.patch.object(Loader, "_decoded", decoded):
        yield
    if not calls:
        raise RuntimeError("stage 1 no longer takes its images from Loader._decoded: they were decoded")


def _decoding(kit: Kit, rows: Rows, schema: EmbeddingStore, wanted: float) -> None:
    """Images/s decoded and resized by the number of threads of one process, and how many the tower would need."""
    loader, rates = Loader(schema), dict[int, float]()
    for threads in sorted({count for count in (1, 2, 4, 8, 12, 16) if count < cpus()} | {cpus()}):
        some = list(islice(cycle(rows), threads * kit.sizes.batch // 2))
        rates[threads] = len(some) / seconds([partial(_load, loader, some, threads)], _CPU, repeats=1)
        kit.line(f"decoding on {threads} threads", rates[threads], "images/s", f"{rates[threads] / threads:,.0f} each")
    enough = [count for count, rate in rates.items() if rate >= wanted]
    at = f"the bare forward takes {wanted:,.0f} images/s; one process decodes {max(rates.values()):,.0f} at most"
    kit.line("decoding threads that the bare forward needs", str(min(enough, default="more than one process")), "", at)


def _load(loader: Loader, rows: Rows, threads: int) -> None:
    def some(part: Rows) -> None:
        for row in part:
            loader.load(row)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, (rows[at : at + _TASK] for at in range(0, len(rows), _TASK))))


def _other_weights(kit: Kit, clip: Clip, tower: Tower) -> None:
    """The bare forward with float32 weights under autocast against weights held in each half precision."""
    ways: tuple[tuple[Precision, bool], ...] = (("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True))
    whole = copy.deepcopy(clip.model.visual).float()
    for precision, held in ways:
        module = copy.deepcopy(whole).to(DTYPES[precision]) if held else whole
        rate = Tower(kit, module, tower.size).rate(precision, kit.sizes.batch)
        name = f"{precision} weights" if held else f"float32 weights under autocast to {precision}"
        at = f"batch {kit.sizes.batch}: {tower.share(rate, precision):.0%} of the peak in {precision}"
        kit.line(f"bare forward, {name}", rate, "images/s", at)


def _compiled(kit: Kit, clip: Clip, rows: Rows, schema: EmbeddingStore, eager: float) -> None:
    """--compile: whether it gives the same embeddings, and how much faster."""
    loaded = [Loader(schema).load(row) for row in rows[: schema.batch_size]]
    pixels = torch.cat([one.pixels_V3HW for one in loaded])  # type: ignore[union-attr]
    before = clip.encode_images(pixels).double()
    clip.compile(schema.batch_size)
    began = time.monotonic()
    after = clip.encode_images(pixels).double()
    kit.check("compiled: least cosine to eager", float((before * after).sum(dim=1).min()), least=0.999)
    kit.line("compiling", time.monotonic() - began, "s", "the first batch")
    with undecoded(rows, schema):
        rate = steady(rows, schema, clip, cpus(), kit.sizes.encoded)
    kit.line("stage 1 compiled, images in memory", rate, "images/s", f"{rate / eager:.3f} of the eager bare forward")
