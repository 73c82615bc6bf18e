"""The trainer's loader from the original images against a store with pixels: images/s and bytes read."""

import io
import statistics
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.measure import machine, median, ratio, rounds, table
from benchmarks.stage1 import gather, trivial_teacher, write_tar
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.images.decode import decode_pillow, open_image
from dimefm.models.clip import load_clip
from dimefm.store.embedding_store import Store
from dimefm.training.batch_loader import Requests, training_loader
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.row_order import Order


@click.command()
@click.option("--images", required=True, help="Glob of tars.")
@click.option("--limit", default=512, show_default=True, help="Images to use.")
@click.option("--enlarge", default=1.0, show_default=True, help="Make them larger first, as photographs are.")
@click.option("--pixels", default=256, show_default=True, help="Short side of the kept JPEGs.")
@click.option("--size", default=224, show_default=True, help="Of the student.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
def training_pixels(images: str, limit: int, enlarge: float, pixels: int, size: int, count: int) -> None:
    """Training images/s and bytes read, with and without --pixels."""
    torch.set_num_threads(1)
    data = gather(sorted(Path(images).parent.glob(Path(images).name)), limit)
    if enlarge != 1:
        data = {name: enlarged(jpeg, enlarge) for name, jpeg in data.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tar = write_tar(folder / "images" / "0.tar", data)
        clip = load_clip(f"local-dir:{trivial_teacher(folder / 'teacher')}", device="cpu")
        stores = {}
        for label, side in (("original files", None), (f"--pixels {pixels}", pixels)):
            request = PlanRequest(kind="image", arguments=(str(tar),), pixels=side, shard_rows=512)
            stores[label] = open_or_plan(request, str(folder / f"{side}.zarr"), clip.identity)
            for shard in range(stores[label].schema.shards):
                encode_shard(stores[label], shard, clip)
        seconds = rounds({label: lambda s=store: _epoch(s, size) for label, store in stores.items()}, count)
        read = {"original files": sum(map(len, data.values())), f"--pixels {pixels}": _kept_bytes(stores)}
        lines = [
            (label, f"{len(data) / median(seconds[label]):,.0f}", f"{read[label] / len(data) / 1e3:,.1f} kB")
            for label in stores
        ]
    click.echo(table(("read from", "images/s, one process", "read an image"), lines))
    plain, kept = seconds.values()
    times, fewer = ratio(plain, kept), read["original files"] / read[f"--pixels {pixels}"]
    click.echo(f"with pixels: {times:.2f}x the images/s, {fewer:.2f}x fewer bytes")
    side = statistics.median(min(open_image(d).size) for d in data.values())
    facts = f"{len(data):,} JPEGs, median short side {side:.0f}, student at {size} px, warm files"
    click.echo(f"{machine()}; {facts}, medians of {count} paired rounds")


def _epoch(store: Store, size: int) -> None:
    augmentation = Augmentation(size=size, crop_scale=(0.4, 1.0), flip=True, seed=0)
    order = Order(store=store, seed=0, batch_size=32)
    requests = Requests(order, first=0, steps=order.steps_per_epoch)
    for _ in training_loader(TrainingImages(store.path, augmentation), requests, 0):
        pass


def _kept_bytes(stores: dict[str, Store]) -> int:
    store = list(stores.values())[-1]
    return sum(map(len, store.pixels(np.arange(store.schema.rows))))


def enlarged(jpeg: bytes, times: float) -> bytes:
    """A JPEG of so many times the width and height, as a photograph would have."""
    image = decode_pillow(jpeg).convert("RGB")
    sink = io.BytesIO()
    image.resize((round(image.width * times), round(image.height * times)), Image.Resampling.BICUBIC).save(
        sink, "JPEG", quality=92
    )
    return sink.getvalue()
