"""Does it help to choose the images? Students after equal images seen: of all images, without near-copies, balanced
over clusters, and of random draws of the same sizes; from a store as it is, and from one in which a third of the images
are near-copies of a few hundred, as on the web.

Stores, selections, runs and evaluations are kept in --out: what is there is not done again.
"""

import io
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageEnhance

from benchmarks.measure import machine, table
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from dimefm.system.allocator import keep_freed_memory
from dimefm.system.machine import describe
from dimefm.training.recipes import sample
from dimefm.training.train import train

SETS = ("cifar10", "caltech101", "tiny_imagenet_val")
_COPIED, _REPLACED = 300, 1 / 3


@click.command()
@click.option("--images", multiple=True, required=True, help="Tars of images.")
@click.option("--data", required=True, help=f"Folder of the sets {', '.join(SETS)}.")
@click.option("--teacher", help="Default: the sample's.")
@click.option("--seen", default=40_000, show_default=True, help="Images seen by each student.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--dedup", default=0.9, show_default=True)
@click.option("--out", default="runs/image-choices", show_default=True)
def image_choices(
    images: tuple[str, ...], data: str, teacher: str | None, seen: int, seeds: int, dedup: float, out: str
) -> None:
    """Students of chosen images: zero-shot top-1 on three sets, after equal images seen."""
    keep_freed_memory()  # as train-student does
    base, teacher = Path(out), teacher or f"local-dir:{sample_dir() / 'teacher'}"
    copies = base / "with-copies.tar"
    _write_with_copies(copies, images)
    lines = []
    for name, sources in (("as they are", images), ("a third near-copies", (str(copies),))):
        store = base / f"{name.replace(' ', '-')}.zarr"
        _dimefm("cache-images", *sources, "--out", str(store), "--teacher", teacher, "--precision", "bf16",
                "--pixels", "72")  # fmt: skip
        for arm, selection in _arms(base, store, dedup).items():
            rows = Store(str(store)).contents.good if selection is None else len(SelectedImages(selection).rows())
            found = [_top1(base, store, selection, arm, Path(data), seen, seed) for seed in range(seeds)]
            mean = [statistics.fmean(one) for one in found]
            each = [f"{statistics.fmean(column):.1f}" for column in zip(*found, strict=True)]
            spread = f" ± {statistics.stdev(mean):.1f}" if seeds > 1 else ""
            lines.append((name, arm, f"{rows:,}", *each, f"{statistics.fmean(mean):.1f}{spread}"))
            click.echo(f"{lines[-1]}", err=True)
    click.echo(table(("store", "images", "how many", *SETS, "mean"), lines))
    how = f"recipe sample, {seen:,} images seen, {seeds} seeds, one torch thread, bf16"
    click.echo(f"\n{machine()}, {describe('cpu')}; {how}; near-copies: --dedup {dedup:g}; zero-shot top-1 in percent")


def _arms(base: Path, store: Path, dedup: float) -> dict[str, str | None]:
    """The ways to choose, with their selections; a random draw beside each, of its size."""

    def select(name: str, *words: str) -> str:
        out = base / f"{store.stem}-{name}.selection"
        _dimefm("select-images", str(store), "--out", str(out), *words, "--device", "cpu")
        return str(out)

    half = str(Store(str(store)).contents.good // 2)
    alone = select("dedup", "--dedup", str(dedup))
    size = str(len(SelectedImages(alone).rows()))
    return {
        "all": None,
        f"--dedup {dedup:g}": alone,
        "random, as many": select("random-dedup", "--by", "random", "--size", size),
        "--balance, half": select("balance", "--balance", "--size", half),
        "--dedup and --balance, half": select("both", "--dedup", str(dedup), "--balance", "--size", half),
        "random, half": select("random-half", "--by", "random", "--size", half),
    }


def _top1(base: Path, store: Path, selection: str | None, arm: str, data: Path, seen: int, seed: int) -> list[float]:
    """Top-1 in percent on each set."""
    name = f"{store.stem}-{arm.replace(' ', '-').replace(',', '')}-{seed}"
    run, batch = str(base / name), 32
    train(
        sample(
            str(store), None, run, image_selection=selection, max_steps=seen // batch, epochs=10_000, seed=seed,
            warmup_epochs=seen / 20 / Store(str(store)).schema.rows, precision="bf16", threads=1, workers=0,
            checkpoint_every=seen // batch, log_every=100, batch_size=batch,
        )
    )  # fmt: skip
    folders = tuple(str(data / one) for one in SETS)
    fast: dict[str, Any] = {"decoder": "fast", "threads": 1, "skip_existing": True}
    done = evaluate(EvaluationConfig(model=run, folders=folders, out=str(base / "evaluations"), name=name, **fast))
    found = {result.set: 100 * result.metrics["top1"] for result in done.results}
    return [found[one] for one in SETS]


def _write_with_copies(path: Path, sources: tuple[str, ...]) -> None:
    """The images of the tars, a third of them replaced by near-copies of a few hundred: how often each was copied is
    as uneven as on the web."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    images = [one for source in sources for one in _members(source)]
    places = rng.permutation(len(images))
    replaced = places[: int(len(images) * _REPLACED)]
    weights = 1 / np.arange(1, _COPIED + 1)
    chosen = rng.choice(places[-_COPIED:], len(replaced), p=weights / weights.sum())
    for place, original in zip(replaced.tolist(), chosen.tolist(), strict=True):
        images[place] = (f"copy-{place:06d}.jpg", _near_copy(images[original][1], rng))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in images:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _members(path: str) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.name.lower().endswith(".jpg")]
        return [(name, file.read()) for name, file in files if file]


def _near_copy(data: bytes, rng: np.random.Generator) -> bytes:
    """Cropped to nine tenths or more, perhaps mirrored, a little brighter or darker, compressed again."""
    image = Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
    width, height = image.size
    share = rng.uniform(0.9, 1)
    left, top = rng.uniform(0, 1 - share, 2) * (width, height)
    image = image.crop((int(left), int(top), int(left + share * width), int(top + share * height)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sink = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15)).save(
        sink, "JPEG", quality=int(rng.integers(50, 95))
    )
    return sink.getvalue()


def _dimefm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dimefm", *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)
