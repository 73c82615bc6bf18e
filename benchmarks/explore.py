"""How long a person waits for an answer of `dimefm explore`, over HTTP: median and 95th percentile.

The store is simulated (`benchmarks.simulated`); the sample's teacher encodes what is asked. Each kind of question is
asked in turn, of the command itself, which runs as a program of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import numpy as np

from benchmarks.measure import machine, median, rounds, table
from benchmarks.simulated import simulate
from dimefm.models.clip import load_clip
from dimefm.sample import sample_dir
from dimefm.sources.account import Account
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.read_image import ImagePlace, read_encoded

_TEACHER = f"local-dir:{sample_dir() / 'teacher'}"
_PATIENCE = 600  # seconds until all is loaded


@click.command()
@click.option("--rows", default=500_000, show_default=True)
@click.option("--results", default=24, show_default=True, help="Asked for at once.")
@click.option("--count", default=40, show_default=True, help="Questions of each kind.")
@click.option("--index", is_flag=True, help="Measure an index over the store too; of random rows its recall is low.")
def explore(rows: int, results: int, count: int, index: bool) -> None:
    """Answers of explore to sentences, images and rows."""
    identity = load_clip(_TEACHER, device="cpu").identity
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "texts.zarr")
        simulate(store, "text", rows, identity.embed_dim, [], identity)
        ways = [("rows in memory", str(store), []), ("rows read each time", str(store), ["--memory", "1KB"])]
        if index:
            out = f"{folder}/texts.index"
            words = ["build-index", str(store), "--out", out, "--accept", "--recall", "0.1"]
            subprocess.run([sys.executable, "-m", "dimefm", *words], check=True, stdout=subprocess.DEVNULL)
            ways.append(("index", out, []))
        for name, path, options in ways:
            with _served(path, *options) as (url, loading):
                lines += [(name, f"{loading:.1f}", *line) for line in _measure(url, rows, results, count)]
    click.echo(table(("search", "until ready, s", "asked with", "median, ms", "95th percentile, ms"), lines))
    asked = f"{count} questions of each kind, {results} results each"
    click.echo(f"{machine()}; {rows:,} x {identity.embed_dim} float16; the sample's teacher; {asked}")


@contextmanager
def _served(path: str, *options: str) -> Iterator[tuple[str, float]]:
    """The URL of the command, and the seconds until all was loaded."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "dimefm", "explore", path, "--device", "cpu", "--quiet", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().strip()
        while (state := _ask(f"{url}state"))["state"] == "loading":
            if time.perf_counter() - began > _PATIENCE:
                raise click.ClickException(f"{path} is not ready after {_PATIENCE} s")
            time.sleep(0.1)
        if state["state"] == "failed":
            raise click.ClickException(state["words"])
        yield url, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def _measure(url: str, rows: int, results: int, count: int) -> list[tuple[str, ...]]:
    """A line for each kind of question."""
    rng, number, how = np.random.default_rng(0), iter(range(10**9)), f"count={results}"
    image = _image()
    seconds = rounds(
        {
            "a sentence": lambda: _ask(f"{url}text?{how}", f"a photo of thing {next(number)}".encode()),
            "an image": lambda: _ask(f"{url}image?{how}", image),
            "a row": lambda: _ask(f"{url}row?{how}&row={rng.integers(rows)}"),
        },
        count,
    )
    return [
        (name, f"{1000 * median(times):.0f}", f"{1000 * float(np.percentile(times, 95)):.0f}")
        for name, times in seconds.items()
    ]


def _ask(url: str, body: bytes | None = None) -> Any:
    with urlopen(url, body, timeout=_PATIENCE) as answer:
        found = json.load(answer)
    if "error" in found:
        raise click.ClickException(found["error"])
    return found


def _image() -> bytes:
    """A photo of the sample."""
    source = open_image_source([str(sample_dir() / "images" / "train-00000.tar")])
    sample = next(iter(source.samples(Account())))
    return read_encoded(ImagePlace(sample.file, sample.offset, sample.size))
