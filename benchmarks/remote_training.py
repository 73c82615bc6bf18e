"""Training's loader from an object store far away: without a cache, and through an empty and a full one, against local.

The object store is a process of this machine that answers after a round trip and sends so many bytes a second over all
connections (benchmarks/distant_s3.py); the client is s3fs, as for a user. Stores are a shard of random embeddings and
of the sample's images, enlarged and kept as JPEGs, under many names (hard links).
"""

import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.distant_s3 import counts, distant_s3
from benchmarks.measure import machine, median, ratio, table
from benchmarks.plan_scale import TEACHER
from benchmarks.simulated import _plan, simulate
from benchmarks.stage1 import gather
from cache_schemas import EmbeddingStore, SourceSummary, Status
from cache_schemas.embedding_store import EMBEDDING, PIXEL_INDEX, STATUS, commit_path, pixels_path, rows_path
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.local_copy import bring
from dimefm.store.parquet_tables import write_plan
from dimefm.store.pixel_tar import pixel_tar
from dimefm.system import storage
from dimefm.system.file_cache import caching_in
from dimefm.training import text_bank
from dimefm.training.batch_loader import Requests, training_loader
from dimefm.training.config import TextMix
from dimefm.training.fetch_ahead import fetching_ahead
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.row_order import Order
from dimefm.training.text_bank import TextBank

_SHARD, _CHUNK, _DIM, _PIXELS = 4096, 1024, 768, 256
_WAYS = ("local", "no cache", "empty cache", "its windows fetched", "full cache")
_SETTLED = 20.0  # seconds in which a process fetches what it may: three windows, 1.5 GB


@click.command()
@click.option("--rows", default=64 * _SHARD, show_default=True, help="Images.")
@click.option("--texts", default=64 * _SHARD, show_default=True, help="Sentences.")
@click.option("--latency", "latencies", multiple=True, type=float, default=(0.02, 0.05), show_default=True)
@click.option("--bandwidth", default=100e6, show_default=True, help="Bytes a second, of all connections together.")
@click.option("--size", default=224, show_default=True, help="Of the student.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--texts-per-step", default=256, show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--steps", default=16, show_default=True, help="Of each way in each round, after the first.")
@click.option("--rate", default=0.0, show_default=True, help="Images a second that a step takes; 0: none at all.")
@click.option("--count", default=3, show_default=True, help="Rounds.")
@click.option("--folder", help="Where the stores are, or are made and kept. Default: a temporary folder.")
def remote_training(
    rows: int, texts: int, latencies: tuple[float, ...], bandwidth: float, size: int, batch_size: int,
    texts_per_step: int, workers: int, steps: int, rate: float, count: int, folder: str | None,
) -> None:  # fmt: skip
    """The loader of training from s3:// with and without a cache on the disk, against local stores."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, patch.object(text_bank, "_room_in_memory", lambda: 0):
        base = Path(folder or temporary) / "bucket"
        _make(base, rows, texts)
        run = _Run(base, temporary, size, batch_size, texts_per_step, workers, steps, rate)
        for latency in latencies:
            with distant_s3(base.parent, latency, bandwidth) as address:
                found = [run.round(address, turn) for turn in range(count)]
            lines = [(way, *_line(way, found)) for way in _WAYS]
            head = ("read from", "to the first batch", "images/s", "of local", "waiting", "requests", "MB")
            click.echo(table((f"{1e3 * latency:g} ms: {head[0]}", *head[1:]), lines) + "\n")
    what = f"batches of {batch_size} at {size} px, {texts_per_step} sentences a step, {workers} loader"
    click.echo(f"{machine()}; {what}, {steps} steps, medians of {count} rounds, {bandwidth / 1e6:g} MB/s")
    click.echo("a step takes no time" if not rate else f"a step takes a batch's share of a second at {rate:g} images/s")


def _line(way: str, found: list[dict[str, tuple[float, ...]]]) -> tuple[str, ...]:
    first, rates, waits, requests, sent = (list(column) for column in zip(*(one[way] for one in found), strict=True))
    share = ratio(rates, [one["local"][1] for one in found])
    traffic = f"{median(requests):,.0f}", f"{median(sent) / 1e6:,.0f}"
    return f"{median(first):.1f} s", f"{median(rates):,.0f}", f"{share:.2f}", f"{median(waits):.0%}", *traffic


class _Run:
    def __init__(
        self, base: Path, temporary: str, size: int, batch: int, texts: int, workers: int, steps: int, rate: float
    ) -> None:
        self.base, self.temporary, self.size, self.batch, self.texts = base, temporary, size, batch, texts
        self.workers, self.steps, self.rate = workers, steps, rate

    def round(self, address: str, turn: int) -> dict[str, tuple[float, ...]]:
        """Of each way: seconds to the first batch, images/s after it, the share of these that the step waited, requests
        and bytes."""
        found, cache = {}, f"{self.temporary}/cache-{turn}-{os.urandom(4).hex()}"
        for way in ("local", "no cache", "empty cache", "full cache"):
            before, later = counts(address), ["its windows fetched"] if way == "empty cache" else []
            with caching_in(cache if way.endswith(" cache") and way != "no cache" else None):
                for name, seconds in self._measure("s3://bucket" if way != "local" else str(self.base), [way, *later]):
                    after = counts(address)
                    found[name] = (*seconds, after[0] - before[0], after[1] - before[1])
                    click.echo(f"  {name}: " + ", ".join(f"{value:,.2f}" for value in found[name]), err=True)
        storage.remove_folder(cache)
        return found

    def _measure(self, base: str, names: list[str]) -> Iterator[tuple[str, tuple[float, float, float]]]:
        began = time.perf_counter()
        store, texts = Store(f"{base}/images.zarr"), Store(f"{base}/texts.zarr")
        order = Order(store=store, seed=0, batch_size=self.batch, kind="chunks")
        bank = TextBank(texts, TextMix(), None, seed=0, total=self.texts)
        bring(texts)
        augmentation = Augmentation(size=self.size, crop_scale=(0.08, 1.0), flip=True, seed=0)
        with ExitStack() as stack:
            stop = order.steps_per_epoch
            position = stack.enter_context(fetching_ahead([order], (), 0, stop))
            requests = Requests(order, first=0, steps=stop, position=position)
            batches: Iterator[Batch] = training_loader(
                TrainingImages(store, augmentation, [bank]), requests, self.workers
            )
            stack.callback(batches.close)  # type: ignore[attr-defined]
            next(batches)
            first = time.perf_counter() - began
            for name in names:
                if name != names[0]:
                    time.sleep(_SETTLED)
                    deque(islice(batches, 4 * self.workers + 1), 0)  # those that were made in the meantime
                yield name, (first, *self._steps(batches))

    def _steps(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Images/s over the steps, and the share of them that was waited for batches."""
        waited, began = 0.0, time.perf_counter()
        asked = began
        for _ in islice(batches, self.steps):
            waited += time.perf_counter() - asked
            if self.rate:
                time.sleep(self.batch / self.rate)
            asked = time.perf_counter()
        spent = time.perf_counter() - began
        return self.steps * self.batch / spent, waited / spent


def _make(base: Path, rows: int, texts: int) -> None:
    simulate(base / "texts.zarr", "text", texts, _DIM, [])
    path = base / "images.zarr"
    if (path / commit_path(-(-rows // _SHARD) - 1)).exists():
        return
    summary = SourceSummary(arguments=(), files=0, bytes=0, digest="simulated", repeated_keys=0, problems=())
    schema = EmbeddingStore(
        kind="image", rows=rows, dim=_DIM, chunk_rows=_CHUNK, shard_rows=_SHARD, batch_size=64, pixels=_PIXELS,
        teacher=replace(TEACHER, embed_dim=_DIM), source=summary,
    )  # fmt: skip
    shards = range(schema.shards)
    digests = [write_plan(str(path), shard, _plan("image", *schema.shard_range(shard), [])) for shard in shards]
    store = create_store(str(path), schema, digests, [])
    rng = np.random.default_rng(0)
    values_ND = rng.standard_normal((_SHARD, _DIM), dtype=np.float32)
    index_N3 = np.zeros((_SHARD, 3), np.int64)
    jpegs = [_enlarged(jpeg) for jpeg in gather(sorted((sample_dir() / "images").glob("train-*.tar")), 96).values()]
    with pixel_tar(str(path / pixels_path(0))) as tar:
        for row in range(_SHARD):
            index_N3[row] = tar.add(row, jpegs[row % len(jpegs)])
        digest = tar.finish()
    values_ND /= np.linalg.norm(values_ND, axis=1, keepdims=True)
    status_N = np.full(_SHARD, Status.OK, np.uint8)
    arrays = {EMBEDDING: values_ND.astype(np.float16), STATUS: status_N, PIXEL_INDEX: index_N3}
    first = store.write_shard(0, arrays, (), device="none", seconds=0, pixels=digest)
    for shard in shards[1:]:
        for name in (*(store.shard_file(name, 0) for name in arrays), pixels_path(0)):
            target = path / name.replace("/c/0", f"/c/{shard}").replace(pixels_path(0), pixels_path(shard))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path / name, target)
        start, stop = schema.shard_range(shard)
        plan = schema.digests.get(rows_path(shard), digests[shard])
        storage.write_json(
            str(path / commit_path(shard)), replace(first, shard=shard, start=start, stop=stop, plan=plan).to_json()
        )


def _enlarged(jpeg: bytes) -> bytes:
    image = (
        Image.open(io.BytesIO(jpeg), formats=["JPEG"])
        .convert("RGB")
        .resize((_PIXELS * 4 // 3, _PIXELS), Image.Resampling.BICUBIC)
    )
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()
