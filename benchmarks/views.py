"""What a cached view costs in CPU time: an image is read and decoded once, whatever the number of its views."""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import click
import torch
from PIL import Image

from benchmarks.measure import machine, median, table
from cache_schemas import StrongViews, ViewPlan
from cache_schemas.views import Operation
from dimefm.caching.image_loader import Known, Loaded, Loader
from dimefm.caching.plan import PlanRequest, forecast
from dimefm.images import operations
from dimefm.images.crops import level
from dimefm.images.decode import decode_pillow, decode_rgb
from dimefm.models.clip import load_clip
from dimefm.sample import sample_dir
from dimefm.sources.read_image import read_encoded

_COUNTS = (1, 4, 16)
_CROP = ViewPlan(count=1, seed=0, crop_scale=(0.4, 1.0), flip=True)
_STRONG = replace(_CROP, strong=StrongViews())
_KINDS = {"crop": _CROP, "strong": _STRONG, "strong, mixed": replace(_STRONG, mixup=1.0)}


@click.command()
@click.option("--images", default=64, show_default=True, help="Images of the sample, enlarged to photographs.")
@click.option("--photo", default=500, show_default=True, help="Pixels of the long side of an image; 3/4 of it high.")
@click.option("--size", default=224, show_default=True, help="Pixels of a side that the teacher sees.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
def views(images: int, photo: int, size: int, count: int) -> None:
    """CPU time of a view: crops, strong views, mixed ones; and of each operation."""
    torch.set_num_threads(1)
    clip = load_clip(f"local-dir:{sample_dir() / 'teacher'}", device="cpu")
    facts = replace(clip.identity.preprocessing, size=(size, size))
    with tempfile.TemporaryDirectory() as folder:
        _write_photographs(Path(folder), images, photo)
        found = forecast(PlanRequest(kind="image", arguments=(folder,)), clip.identity, keep=images)
        schema = replace(found.schema, teacher=replace(clip.identity, preprocessing=facts), shard_rows=images)
        loaders = {"whole image": Loader(schema)}
        for kind, plan in _KINDS.items():
            for number in _COUNTS:
                theirs = replace(schema, views=replace(plan, count=number))
                loaders[f"{kind} {number}"] = Loader(theirs, known=Known(image=found.first.__getitem__))

        def load(loader: Loader) -> list[Loaded]:
            return [one for row in found.first if isinstance(one := loader.load(row), Loaded)]

        seconds = _cpu_seconds(
            {
                "decode": lambda: [decode_rgb(read_encoded(row)) for row in found.first],
                **{name: partial(load, loader) for name, loader in loaders.items()},
            },
            count,
        )
        crops = [one.pixels_V3HW[0].numpy() for one in load(loaders["crop 1"])[:16]]
    each = {name: 1000 * value / images for name, value in seconds.items()}
    click.echo(f"CPU ms per image: read and decode {each['decode']:.2f}, the whole image {each['whole image']:.2f}")
    rows = []
    for kind in _KINDS:
        times = [each[f"{kind} {number}"] for number in _COUNTS]
        further = (times[-1] - times[0]) / (_COUNTS[-1] - _COUNTS[0])
        rows.append((kind, *(f"{time:.2f}" for time in times), f"{further:.2f}"))
    heads = (f"{number} view{'s' if number > 1 else ''}" for number in _COUNTS)
    click.echo(table(("CPU ms per image", *heads, "each further view"), rows))
    _show_operations(crops, count)
    photos = f"{images} images of {photo} x {photo * 3 // 4}"
    click.echo(f"one core of: {machine()}; {photos}, {size} px, medians of {count} rounds")


def _cpu_seconds(candidates: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """The median CPU time of each, over `count` rounds after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(count + 1):
        for name, call in candidates.items():
            began = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: median(values) for name, values in seconds.items()}


def _write_photographs(folder: Path, images: int, side: int) -> None:
    """Images of the sample as JPEGs of a photograph's size."""
    with tarfile.open(sample_dir() / "images" / "train-00000.tar") as tar:
        members = (member for member in tar if member.name.endswith(".jpg"))
        for member in islice(members, images):
            data = tar.extractfile(member)
            assert data is not None
            large = decode_pillow(data.read()).convert("RGB").resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
            large.save(folder / Path(member.name).name, quality=90)


def _show_operations(crops: list[operations.Pixels], count: int) -> None:
    """The milliseconds of each operation, at the level of magnitude 9."""

    def applied(operation: Operation) -> object:
        return [operations.apply(pixels, operation, level(operation, 0.9, 1)) for pixels in crops]

    seconds = _cpu_seconds(
        {
            **{one.name: partial(applied, one) for one in Operation if one},
            "JITTER": lambda: [operations.jitter(pixels, 300, 200, 280) for pixels in crops],
            "MIX": lambda: [operations.mix(pixels, crops[0], 100) for pixels in crops],
        },
        count,
    )
    each = {name.lower(): 1000 * value / len(crops) for name, value in seconds.items()}
    click.echo("CPU ms of an operation: " + ", ".join(f"{name} {ms:.2f}" for name, ms in each.items()))
