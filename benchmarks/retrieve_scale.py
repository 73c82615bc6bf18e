"""`retrieve` at the paper's size: one process against workers on Ray, and the count of hits over 28.4M sentences."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.measure import machine, median, ratio, table
from benchmarks.processes import Usage, run

_PAPER_SHARDS, _PAPER_TEXTS, _SHARD_ROWS, _TOP_K = 611, 28_400_000, 65536, 16


@click.command()
@click.option("--images", help="Image store, for one process against two workers; with --texts and --index.")
@click.option("--texts", help="Text store.")
@click.option("--index", help="Index over it.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--shards", default=8, show_default=True, help="Shards of pairs whose hits are counted.")
@click.option("--count", "way", type=click.Choice(["dense", "sparse"]), hidden=True)
def retrieve_scale(
    images: str | None, texts: str | None, index: str | None, rounds: int, shards: int, way: str | None
) -> None:
    """retrieve on Ray, and its hits, at the paper's size."""
    if way:
        _count(way, shards)
        return
    click.echo(f"{machine()}\n")
    click.echo(_hits_table(shards))
    if images and texts and index:
        click.echo(f"\n{_workers_table(images, texts, index, rounds)}")


def _count(way: str, shards: int) -> None:
    """Count the hits of simulated shards of the paper's size; prints CPU seconds per shard and the peak in bytes."""
    import numpy as np

    rng = np.random.default_rng(0)
    hits_T = np.zeros(_PAPER_TEXTS, np.uint32)
    seconds = 0.0
    for _ in range(shards):
        row_NK = rng.integers(_PAPER_TEXTS, size=(_SHARD_ROWS, _TOP_K), dtype=np.int32)
        began = time.process_time()
        if way == "dense":  # as it was before: an array of all sentences for each shard
            hits_T += np.bincount(row_NK[row_NK >= 0], minlength=_PAPER_TEXTS).astype(np.uint32)
        else:
            np.add.at(hits_T, row_NK[row_NK >= 0], np.uint32(1))
        seconds += time.process_time() - began
    print(seconds / shards, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _hits_table(shards: int) -> str:
    rows = []
    for way in ("dense", "sparse"):
        words = [sys.executable, "-m", "benchmarks", "retrieve-scale", "--count", way, "--shards", str(shards)]
        seconds, peak = map(float, subprocess.check_output(words, text=True).split())
        name = {"dense": "an array of all sentences per shard", "sparse": "the sentences that a shard has"}[way]
        whole = f"{seconds * _PAPER_SHARDS / 60:.1f} min"
        rows.append((name, f"{seconds * 1000:.0f} ms", whole, f"{peak / 1e6:,.0f} MB"))
    return table(
        ("hits over 28.4M sentences", "CPU per shard of 65,536 x 16", "CPU for 40M images", "peak memory"), rows
    )


def _workers_table(images: str, texts: str, index: str, rounds: int) -> str:
    from dimefm.store.embedding_store import Store

    count = Store(images).schema.rows
    ways: dict[str, list[str]] = {"one process": [], "two workers": ["--workers", "2"]}
    found: dict[str, list[Usage]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, more in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                words = ["retrieve", images, "--texts", texts, "--index", index, "--out", str(Path(folder, "p.zarr"))]
                found[name].append(run([sys.executable, "-m", "dimefm", *words, *more, "--quiet"], memory=True))
    walls = {name: [usage.wall for usage in usages] for name, usages in found.items()}
    rows = [
        (
            name,
            f"{median(walls[name]):.1f} s",
            f"{ratio(walls[name], walls['one process']):.2f}",
            f"{median([usage.total_cpu for usage in usages]):.1f} s",
            f"{median([max(size for _, size in usage.memory) for usage in usages]) / 1e9:.2f} GB",
        )
        for name, usages in found.items()
    ]
    return table((f"{count:,} images", "wall, with start", "against one", "CPU", "peak of all processes"), rows)
