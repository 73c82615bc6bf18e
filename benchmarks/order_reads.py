"""The order of training rows: chunks, as older runs have it, against blocks. How mixed batches of a sorted source are,
and how fast an epoch is read from cold files."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import machine, median, ratio, rounds, table
from benchmarks.plan_scale import TEACHER
from cache_schemas import EmbeddingStore, SourceSummary, Status
from cache_schemas.embedding_store import EMBEDDING, PIXEL_INDEX, STATUS, pixels_path
from cache_schemas.plan import PLANS
from dimefm.caching.plan import chunk_rows
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.parquet_tables import write_plan
from dimefm.store.pixel_tar import pixel_tar
from dimefm.training import row_order
from dimefm.training.batch_loader import Requests, training_loader
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.row_order import Order

_SHARD, _BATCH = 8192, 1024


@click.command()
@click.option("--rows", default=65_536, show_default=True)
@click.option("--kilobytes", default=25, show_default=True, help="Of an image, which is not decoded.")
@click.option("--dim", default=768, show_default=True)
@click.option("--window", default=8192, show_default=True, help="Rows of a window of chunks, 65,536 in earnest.")
@click.option("--workers", default=4, show_default=True)
@click.option("--count", default=5, show_default=True, help="Rounds.")
@click.option("--classes", default=650, show_default=True, help="Images of each class of the sorted source.")
@click.option("--sorted-rows", default=4_000_000, show_default=True)
@click.option("--batch-size", default=5120, show_default=True, help="For the mixing.")
def order_reads(
    rows: int, kilobytes: int, dim: int, window: int, workers: int, count: int, classes: int, sorted_rows: int,
    batch_size: int,
) -> None:  # fmt: skip
    """Batches of a sorted source; and an epoch read from files that the system has been told to forget."""
    mixed = [(name, *_mixed(batches)) for name, batches in _batches(sorted_rows, classes, batch_size)]
    click.echo(table(("order", "classes of a batch", "of these in the next batch too"), mixed))
    click.echo(f"{sorted_rows:,} rows, {classes:,} of each class one after another, batches of {batch_size:,}")
    row_order.CHUNKS_WINDOW_ROWS = window
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pixels in (("original files", None), ("--pixels", 256)):
            store = _write(Path(folder) / name, rows, kilobytes << 10, dim, pixels)
            kinds = {kind: lambda s=store, k=kind: _epoch(s, k, workers) for kind in ("chunks", "blocks")}
            seconds = rounds(kinds, count)
            found = {kind: f"{rows / median(times):,.0f}" for kind, times in seconds.items()}
            lines.append((name, *found.values(), f"{ratio(seconds['chunks'], seconds['blocks']):.2f}"))
    click.echo(table(("read from", "chunks, images/s", "blocks, images/s", "ratio"), lines))
    facts = f"{rows:,} images of {kilobytes} kB, {dim} wide, cold, {workers} workers, nothing decoded"
    click.echo(f"{machine()}; {facts}, medians of {count} paired rounds")


def _batches(rows: int, classes: int, size: int) -> Iterator[tuple[str, list[list[set[int]]]]]:
    """The classes of five batches in a row, from several places of an epoch."""
    only, rng = np.arange(rows, dtype=np.int32), np.random.default_rng(0)
    store: Any = SimpleNamespace(schema=SimpleNamespace(rows=rows, chunk_rows=chunk_rows(65536)))
    for kind in ("chunks", "blocks"):
        mine = Order(store=store, seed=0, batch_size=size, only=only, kind=kind)  # type: ignore[arg-type]
        firsts = [part * (mine.steps_per_epoch - 5) // 4 for part in range(5)]
        steps = [[rows_G for _, _, rows_G in mine.steps(first, first + 5)] for first in firsts]
        yield kind, [[set((rows_G // classes).tolist()) for rows_G in run] for run in steps]
    drawn = [[rng.integers(rows, size=size) for _ in range(5)] for _ in range(5)]
    yield "drawn at random", [[set((rows_G // classes).tolist()) for rows_G in run] for run in drawn]


def _mixed(batches: list[list[set[int]]]) -> tuple[str, str]:
    classes = [len(batch) for run in batches for batch in run]
    shared = [len(one & other) / len(one) for run in batches for one, other in pairwise(run)]
    return f"{sum(classes) / len(classes):,.0f}", f"{sum(shared) / len(shared):.1%}"


class _Nothing(Augmentation):
    """No view at all, so that reading is what is timed."""

    def __call__(self, data: bytes, epoch: int, row: int) -> torch.Tensor:
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8)


def _epoch(store: Store, kind: Any, workers: int) -> None:
    for path in Path(store.path).parent.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mine = Order(store=Store(store.path), seed=0, batch_size=_BATCH, kind=kind)
    images = TrainingImages(store.path, _Nothing(size=8, crop_scale=(1.0, 1.0), flip=False, seed=0))
    steps = mine.steps_per_epoch
    assert sum(1 for _ in training_loader(images, Requests(mine, first=0, steps=steps), workers)) == steps


def _write(folder: Path, rows: int, size: int, dim: int, pixels: int | None) -> Store:
    """A finished store of random images, beside it the file that they are in."""
    folder.mkdir()
    path, source, rng = folder / "images.zarr", folder / "images.bin", np.random.default_rng(0)
    summary = SourceSummary(arguments=("none",), files=1, bytes=0, digest="none", repeated_keys=0, problems=())
    schema = EmbeddingStore(
        kind="image", rows=rows, dim=dim, chunk_rows=chunk_rows(_SHARD), shard_rows=_SHARD, batch_size=64,
        teacher=replace(TEACHER, embed_dim=dim), source=summary, pixels=pixels,
    )  # fmt: skip
    digests = []
    for shard in range(schema.shards):
        row_N = np.arange(*schema.shard_range(shard))
        columns = {"row": row_N, "key": [str(row) for row in row_N], "file": [str(source)] * len(row_N)}
        places = {"offset": row_N * size, "size": np.full(len(row_N), size)}
        digests.append(write_plan(str(path), shard, pa.table({**columns, **places}, schema=PLANS["image"])))
    store = create_store(str(path), schema, digests, [])
    with source.open("wb") as file:
        for shard in range(schema.shards):
            start, stop = schema.shard_range(shard)
            arrays: dict[str, np.ndarray[Any, Any]] = {
                EMBEDDING: rng.standard_normal((stop - start, dim), dtype=np.float32).astype(np.float16),
                STATUS: np.full(stop - start, Status.OK, np.uint8),
            }
            digest = None
            if pixels is None:
                file.write(rng.bytes((stop - start) * size))
            else:
                spec = schema.arrays()[PIXEL_INDEX]
                with pixel_tar(str(path / pixels_path(shard))) as tar:
                    places_N = [tar.add(row, rng.bytes(size)) for row in range(start, stop)]
                    digest = tar.finish()
                arrays[PIXEL_INDEX] = np.array(places_N, spec.dtype)
            store.write_shard(shard, arrays, (), device="none", seconds=0, pixels=digest)
    os.sync()  # or the system could not forget it
    return store
