"""Whole training steps against the authors' own loop: the same images, cached targets, student, batch and losses; and
what the step alone takes, below which no loop gets.

Their code is not here. `git clone https://github.com/sunxm2357/DIME-FM`, then give `--authors DIME-FM`.
"""

import base64
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch

from benchmarks.authors_worker import Job
from benchmarks.measure import machine, median, ratio, table, wait
from benchmarks.small_student import resnet10
from benchmarks.training_steps import BareStep
from cache_schemas import Status, StudentSpec, to_plain
from dimefm.models.towers import student_spec
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store
from dimefm.system.machine import choose_precision
from dimefm.training.config import TrainConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import paper
from dimefm.training.train import train

_WORKER = str(Path(__file__).parent / "authors_worker.py")
_RECIPES = {"paper": paper, "resnet10": resnet10}
_PREFETCHED = 4  # batches that a process of dimefm's loader works ahead
_REPAIRED, _OURS, _FLOOR = "authors, loader repaired", "dimefm", "the step alone, on resident tensors"


@click.command()
@click.option("--authors", required=True, help="A clone of https://github.com/sunxm2357/DIME-FM.")
@click.option("--images", required=True, help="Image store.")
@click.option("--texts", required=True, help="Text store.")
@click.option(
    "--recipe", type=click.Choice(list(_RECIPES)), default="resnet10", show_default=True, help="Student, size."
)
@click.option("--student", help="Another image tower than the recipe's.")
@click.option("--batch-size", default=64, show_default=True, help="Images and texts a step.")
@click.option(
    "--workers", default=1, show_default=True, help="Loading processes of images; theirs: and as many for texts."
)
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True,
              help="On a CPU.")  # fmt: skip
@click.option("--resize", type=int, help="Short side before their crop. [256 for 224 px, in proportion for others]")
@click.option("--rows", default=8192, show_default=True, help="Images and texts in their files.")
@click.option("--warm-up", default=20, show_default=True, help="Steps before the timed ones.")
@click.option("--steps", default=60, show_default=True, help="Timed steps, a multiple of 10 as are those before.")
@click.option("--released-steps", default=6, show_default=True, help="Of theirs as released, after 4; 0: none.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
def authors_loop(
    authors: str,
    images: str,
    texts: str,
    recipe: str,
    student: str | None,
    batch_size: int,
    workers: int,
    precision: Literal["auto", "bf16", "fp32"],
    resize: int | None,
    rows: int,
    warm_up: int,
    steps: int,
    released_steps: int,
    count: int,
) -> None:
    """Training images/s of dimefm, of the authors' loop, as released and with its loader repaired, and of dimefm's step
    without a loop around it: what no loop can exceed."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # theirs would spread over several
    cuda, store = torch.cuda.is_available(), Store(images)
    config = _config(_RECIPES[recipe](store.path, Store(texts).path, ""), batch_size, warm_up, steps)
    if precision == "auto":
        precision = "bf16" if choose_precision("cpu") == "bf16" else "fp32"
    config = replace(config, workers=workers, precision="fp16" if cuda else precision)
    config = replace(config, student=student or config.student)
    config = replace(config, max_steps=warm_up + steps + max(10, _PREFETCHED * workers))
    spec = student_spec(config.student, store.schema.teacher, config.image_size)
    size = spec.image_size
    with tempfile.TemporaryDirectory() as name:
        written = write_tsv(Path(name), store, Store(texts), rows)
        if written < (needed := (warm_up + steps + 2 * workers + 1) * batch_size):
            raise click.UsageError(f"{written:,} rows are too few for these steps: they need {needed:,}")
        job = Job(
            authors=str(Path(authors).resolve()),
            data=name,
            student=to_plain(spec),
            resize=resize or round(size * 256 / 224),
            batch_size=batch_size,
            workers=workers,
            precision=precision,
            warm_up=warm_up,
            steps=steps,
            repaired=True,
        )
        slow = replace(job, warm_up=4, steps=released_steps, repaired=False)  # it takes minutes for some steps
        loops = {
            "authors, as released": lambda: _theirs(slow),
            _REPAIRED: lambda: _theirs(job),
            _OURS: lambda: _ours(config, warm_up, steps),
            _FLOOR: lambda: _bare(spec, config, warm_up, steps),
        }
        if not released_steps:
            del loops["authors, as released"]
        rates: dict[str, list[float]] = {name_of: [] for name_of in loops}
        for turn in range(count):
            for name_of, call in loops.items():
                rates[name_of].append(call())
                click.echo(f"round {turn + 1}: {name_of}, {rates[name_of][-1]:,.1f} images/s", err=True)
    ours = rates[_OURS]
    lines = [
        (name, f"{median(found):,.1f}", f"{min(found):,.1f}-{max(found):,.1f}", f"{ratio(ours, found):.2f}")
        for name, found in rates.items()
    ]
    click.echo(table(("loop", "images/s", "lowest-highest", "dimefm is x as fast"), lines))
    bound = ratio(rates[_FLOOR], rates[_REPAIRED])
    click.echo(f"a loop around this step that costs nothing would be {bound:.2f} times as fast as theirs, repaired")
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} torch threads"
    facts = f"{config.student} at {size} px, batches of {batch_size} images and texts, {config.precision}, {where}"
    loaders = f"{workers} loading processes (theirs: and as many for texts)"
    data = f"{written:,} rows in their files, {_source(store)}, which theirs resizes to {job.resize} before the crop"
    click.echo(f"{machine()}; {facts}; {loaders}; {data}")
    timed = f"{steps} steps after {warm_up}" + f", theirs as released {released_steps} after 4" * bool(released_steps)
    click.echo(f"medians of {count} paired rounds, each {timed}; warm files")


def _config(recipe: TrainConfig, batch_size: int, warm_up: int, steps: int) -> TrainConfig:
    """The recipe with the authors' losses and crops, as many texts as images, and nothing written in between."""
    if not steps or warm_up < 10 or steps % 10 or warm_up % 10:
        raise click.UsageError("--warm-up and --steps must be multiples of 10, from 10 on")
    theirs = paper(recipe.images, recipe.texts, "")
    return replace(
        recipe,
        batch_size=batch_size,
        texts_per_step=batch_size,
        loss=theirs.loss,
        crop_scale=theirs.crop_scale,
        epochs=10_000,
        checkpoint_every=10**9,
        log_every=10,
    )


def _ours(config: TrainConfig, warm_up: int, steps: int) -> float:
    """Images/s by the run's own lines. Those of the start are left out, and those in which the loader has nothing left
    to load, and leaves its share of the machine to the step."""
    with tempfile.TemporaryDirectory() as out:
        process = multiprocessing.get_context("spawn").Process(target=train, args=(replace(config, out=out),))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"dimefm's loop ended with {process.exitcode}")
        lines = [line for line in read_metrics(out) if line["event"] == "train"]
    rates = [line["images_per_second"] for line in lines if warm_up < line["step"] <= warm_up + steps]
    return statistics.harmonic_mean(rates)  # lines of equally many images: the rate of all together


def _bare(spec: StudentSpec, config: TrainConfig, warm_up: int, steps: int) -> float:
    """Images/s of forward, backward and optimiser, in a process of its own as the loops are."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_bare_rate, spec, config.batch_size, config.precision, warm_up, steps).result()


def _bare_rate(spec: StudentSpec, batch_size: int, precision: str, warm_up: int, steps: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = BareStep(spec, batch_size, precision, device)
    for _ in range(warm_up):
        step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return steps * batch_size / (time.perf_counter() - began)


def _theirs(job: Job) -> float:
    plain = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # which dimefm has set
    done = subprocess.run([sys.executable, _WORKER, job.to_json()], env=plain, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the authors' loop failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.strip().split("\n")[-1]))


def write_tsv(folder: Path, images: Store, texts: Store, rows: int) -> int:
    """As many rows of both stores, drawn at random, in the authors' files; how many they are."""
    valid = [np.flatnonzero(store.status() == Status.OK) for store in (images, texts)]
    rows = min(rows, *map(len, valid))
    image_N, text_N = (np.random.default_rng(0).choice(found, rows, replace=False) for found in valid)
    entries = texts.samples(text_N)
    _write(folder, "image", "image_00", (base64.b64encode(data).decode() for data in _encoded(images, image_N)))
    _write(folder, "image_feat", "image_00.feat", _features(images.gather(image_N)))
    _write(folder, "text", "text_00", (json.dumps({"captions": [entry["text"]]}) for entry in entries))
    _write(folder, "text_feat", "text_00.feat", _features(texts.gather(text_N)))
    return rows


def _write(folder: Path, listed: str, name: str, values: Iterable[str]) -> None:
    """A file of keys and values, where its lines begin, and the list that names it."""
    at = 0
    with (folder / f"{name}.tsv").open("wb") as tsv, (folder / f"{name}.lineidx").open("w") as index:
        for key, value in enumerate(values):
            index.write(f"{at}\n")
            at += tsv.write(f"{key}\t{value}\n".encode())
    (folder / f"{listed}.list").write_text(f"{name}.tsv\n")


def _encoded(store: Store, rows_N: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """The bytes that dimefm's loader would read of these rows."""
    if store.schema.pixels:
        return store.pixels(rows_N)
    return (read_encoded(ImagePlace(s["file"], s["offset"], s["size"])) for s in store.samples(rows_N))


def _features(vectors_ND: np.ndarray[Any, Any]) -> Iterator[str]:
    return (base64.b64encode(vector.astype(np.float32).tobytes()).decode() for vector in vectors_ND)


def _source(store: Store) -> str:
    return f"JPEGs of short side {store.schema.pixels}" if store.schema.pixels else "original images"
