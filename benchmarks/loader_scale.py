"""The training loader over finished stores of the paper's size: seconds to the first batch, memory, images/s."""

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.measure import machine, table
from benchmarks.simulated import simulate
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store
from dimefm.training import image_batches
from dimefm.training.batch_loader import Requests, training_loader
from dimefm.training.config import TextMix
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.row_order import Order
from dimefm.training.text_bank import TextBank

_PART = 65_536  # rows


@click.command()
@click.option("--images", multiple=True, help="Tars. Default: the sample's.")
@click.option("--rows", default=40_000_000, show_default=True)
@click.option("--texts", default=28_400_000, show_default=True)
@click.option("--dim", default=768, show_default=True)
@click.option("--size", default=224, show_default=True, help="Of the student.")
@click.option("--batch-size", default=1024, show_default=True)
@click.option("--texts-per-step", default=2048, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--windows", default=5, show_default=True, help=f"Parts of {_PART:,} rows to read for the curve.")
@click.option("--order", "kind", type=click.Choice(["blocks", "chunks"]), default="blocks", show_default=True)
@click.option("--folder", help="Where the stores are, or are made and kept. Default: a temporary folder.")
def loader_scale(
    images: tuple[str, ...],
    rows: int,
    texts: int,
    dim: int,
    size: int,
    batch_size: int,
    texts_per_step: int,
    workers: int,
    windows: int,
    kind: str,
    folder: str | None,
) -> None:
    """Training's loader over 40M images and 28.4M sentences: start-up, memory over several windows, images/s."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(folder or temporary)
        tars = [str(Path(tar).absolute()) for tar in images] or [str(t) for t in (sample_dir() / "images").iterdir()]
        simulate(base / "images.zarr", "image", rows, dim, sorted(tars))
        simulate(base / "texts.zarr", "text", texts, dim, [])
        start = _Start(base, size, batch_size, texts_per_step, workers, kind)
        steps = start.order().steps_per_epoch
        lines = []
        for name, step in (("0", 0), ("half an epoch", steps // 2), ("the last but one", steps - 2)):
            batches, seconds = start.first_batch(step)
            batches.close()
            lines.append((f"{name} ({step:,})", *(f"{s:.2f} s" for s in (*seconds, sum(seconds)))))
            click.echo(f"{lines[-1]}", err=True)
        click.echo(table(("step", "open", "order", "first batch", "in all"), lines))
        click.echo(table(*_curve(start, steps // 2, windows)))
        click.echo(table(*_shares(start, steps // 2)))
    about = f"{rows:,} images, {texts:,} sentences, {dim} wide, at {size} px, batches of {batch_size:,}"
    click.echo(f"{machine()}; {about}, {texts_per_step:,} texts a step, {workers} workers, order of {kind}")


class _Start:
    """What a training run opens before its first batch."""

    def __init__(self, base: Path, size: int, batch_size: int, texts: int, workers: int, kind: Any) -> None:
        self.base, self.size, self.batch_size, self.texts, self.workers = base, size, batch_size, texts, workers
        self.kind = kind

    def order(self) -> Order:
        store = Store(str(self.base / "images.zarr"))
        store.require_complete()
        return Order(store=store, seed=0, batch_size=self.batch_size, kind=self.kind)

    def open(self, step: int) -> tuple[TrainingImages, Requests]:
        order, texts = self.order(), Store(str(self.base / "texts.zarr"))
        texts.require_complete()
        bank = TextBank(texts, TextMix(), None, seed=0, total=self.texts)
        augmentation = Augmentation(size=self.size, crop_scale=(0.08, 1.0), flip=True, seed=0)
        requests = Requests(order, first=step, steps=step + 2 * order.steps_per_epoch)
        return TrainingImages(order.store.path, augmentation, [bank]), requests

    def first_batch(self, step: int) -> tuple[Any, list[float]]:
        """The batches that come next, and the seconds of opening, of finding the step in the order (which the loader
        does again), and of the first batch beyond that."""
        times = [time.perf_counter()]
        dataset, requests = self.open(step)
        times.append(time.perf_counter())
        next(iter(requests))
        found = time.perf_counter() - times[-1]
        began = time.perf_counter()
        batches: Iterator[Batch] = training_loader(dataset, requests, self.workers)
        assert next(batches).step == step
        return batches, [times[1] - times[0], found, max(0.0, time.perf_counter() - began - found)]


def _curve(start: _Start, step: int, windows: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Memory and images/s window by window. "Files" are pages of libraries and stores, which the system takes back when
    it needs them; the rest is each process's own. Batches on their way, in /dev/shm, come on top."""
    batches, _ = start.first_batch(step)
    lines, per_window = [], max(1, _PART // start.batch_size)
    for window in range(windows + 1):
        began, count = time.perf_counter(), per_window if window else 1
        for _ in islice(batches, count):
            pass
        rate = count * start.batch_size / (time.perf_counter() - began)
        workers = [_memory(process.pid) for process in multiprocessing.active_children() if process.pid]
        largest = max(workers, key=lambda found: found["Pss_Anon"], default={"Pss_Anon": 0, "Pss_File": 0})
        shown = [f"{m[part] / 1e9:.3f}" for m in (_memory(os.getpid()), largest) for part in ("Pss_Anon", "Pss_File")]
        lines.append((f"{window}", *shown, f"{rate:,.0f}" if window else ""))
        click.echo(f"{lines[-1]}", err=True)
    batches.close()
    head = ("window", "main GB", "files", "largest worker GB", "files", "images/s")
    return head, lines


def _shares(start: _Start, step: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Where a worker's time goes: its share of the batches of two windows, read in this process. In the first it meets
    most chunks of the text store, and compares their checksums. Plans are read by a thread of the training process."""
    dataset, requests = start.open(step)
    parts = {
        "targets": (Store, "gather"), "texts": (TextBank, "draw"),
        "reading": (image_batches, "read_encoded"), "decode and crop": (Augmentation, "__call__"),
    }  # fmt: skip
    spent: dict[str, float] = defaultdict(float)
    kept = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}
    found, count = [], max(1, _PART // start.batch_size // max(1, start.workers))
    mine = islice(requests, 0, None, max(1, start.workers))
    try:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, _clocked(kept[name], name, spent))
        for _ in range(2):
            spent.clear()
            began = time.perf_counter()
            for request in islice(mine, count):
                assert isinstance(batch := dataset[request], Batch), batch
            total = time.perf_counter() - began
            spent["targets"] -= spent["targets in texts"]
            spent["the rest"] = total - sum(spent[name] for name in parts)
            found.append({**spent, "all": total})
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, kept[name])
    lines = [
        (n, *(f"{1e3 * f[n] / count:.1f} ms" for f in found), f"{100 * found[1][n] / found[1]['all']:.1f} %")
        for n in (*parts, "the rest", "all")
    ]
    return ("a worker's time, a batch", "first window", "second window", "share"), lines


def _clocked(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        began, inner = time.perf_counter(), spent["targets"]
        try:
            return call(*args, **options)
        finally:
            spent[name] += time.perf_counter() - began
            if name == "texts":
                spent["targets in texts"] += spent["targets"] - inner

    return timed


def _memory(pid: int) -> dict[str, int]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text if line.startswith("Pss")}
