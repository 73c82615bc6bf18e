"""build-index and its searches, by image queries: against autofaiss on the same vectors, against exact search, and how
fast retrieve reads its stores."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measure import machine, median, ratio, rounds, table
from benchmarks.processes import Usage, run
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_search import IndexSearch
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.store.embedding_store import Store
from dimefm.system.progress import amount

K, _WORKER = 10, str(Path(__file__).parent / "autofaiss_worker.py")


@click.command()
@click.option("--texts", required=True, help="Text store.")
@click.option("--images", required=True, help="Image store: its embeddings are the queries.")
@click.option("--autofaiss", "python", help="The Python of an environment that has autofaiss.")
@click.option("--size", default="100MB", show_default=True, help="What autofaiss's index may take.")
@click.option("--memory", default="2GB", show_default=True, help="What build-index may take.")
@click.option("--queries", default=2000, show_default=True)
@click.option("--count", default=3, show_default=True, help="Rounds of searching.")
def retrieval(texts: str, images: str, python: str | None, size: str, memory: str, queries: int, count: int) -> None:
    """Recall, queries/s, build time and memory of an index over sentences, searched by images."""
    store, queries_QD = Store(texts), draw(Store(images), queries)
    _reading(store, count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        _, truth = ExactSearch(store).search(queries_QD, K)
        rows = [("exact search", "", "", "", "", "", "1.000", f"{queries / (time.perf_counter() - began):,.0f}")]
        words = ["build-index", texts, "--out", str(folder / "ours"), "--queries", images, "--memory", memory]
        ours = run([sys.executable, "-m", "dimefm", *words], memory=True)
        theirs = _autofaiss(python, folder, store, queries_QD, size) if python else None
        index = IndexSearch.open(str(folder / "ours"), store)
        speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(count):
            began = time.perf_counter()
            _, found = index.search(queries_QD, K)
            speeds["ours"].append(queries / (time.perf_counter() - began))
            if python:
                their = json.loads(_call(python, folder, "search"))
                speeds["theirs"].append(their["queries_per_second"])
        sidecar = read_sidecar(str(folder / "ours"))
        probes = sidecar.search_parameters.get("nprobe", 0)
        name = f"{sidecar.factory}, nprobe {probes}, x{sidecar.rescore}"
        rows.append(_row("dimefm", name, ours, sidecar.bytes, recall(found, truth), speeds["ours"]))
        if theirs:
            their_bytes = (folder / "autofaiss.index").stat().st_size
            reached = recall(np.load(folder / "autofaiss-found.npy"), truth)
            rows.append(_row("autofaiss", their["name"], theirs, their_bytes, reached, speeds["theirs"]))
        click.echo(
            table(("", "index", "build", "its CPU time", "peak memory", "size", f"recall@{K}", "queries/s"), rows)
        )
        if theirs:
            faster = ratio(speeds["ours"], speeds["theirs"])
            click.echo(
                f"build-index takes {ours.wall / theirs.wall:.2f} of autofaiss's time, {faster:.2f}x the queries/s"
            )
    facts = f"{store.schema.rows:,} sentences {store.schema.dim} wide, {queries:,} image queries"
    click.echo(
        f"{machine()}; {facts}, medians of {count} rounds of searching; memory of all processes, mapped files too"
    )


def draw(images: Store, count: int) -> Any:
    """Image embeddings float32 (Q, D), other ones than build-index tunes with."""
    rows, embeddings = images.valid_rows(0, images.schema.rows)
    chosen = np.random.default_rng(12345).choice(len(rows), count, replace=False)
    return embeddings[chosen].astype(np.float32)


def _reading(store: Store, count: int) -> None:
    """How fast a store's rows come in order, against its files read into memory without a look at them."""
    files = sorted(Path(store.path).glob("embedding/c/*/0"))
    size = sum(file.stat().st_size for file in files)

    def rows() -> None:
        fresh = Store(store.path)  # which has no checksum behind it
        for shard in range(fresh.schema.shards):
            fresh.valid_rows(*fresh.schema.shard_range(shard))

    seconds = rounds({"raw": lambda: [file.read_bytes() for file in files] and None, "rows": rows}, 2 * count)
    lines = [(name, f"{size / 1e9 / median(took):.1f} GB/s") for name, took in seconds.items()]
    click.echo(table(("read in order", "speed"), lines))
    click.echo(
        f"rows, checksums compared and NaN looked for: {ratio(seconds['raw'], seconds['rows']):.2f} of raw reading"
    )


def _autofaiss(python: str, folder: Path, store: Store, queries_QD: Any, size: str) -> Usage:
    (folder / "vectors").mkdir()
    np.save(folder / "vectors" / "0.npy", store.read(0, store.schema.rows).astype(np.float32))
    np.save(folder / "queries.npy", queries_QD)
    return run([python, _WORKER, str(folder), "build", size], memory=True)


def _call(python: str, folder: Path, work: str) -> str:
    done = subprocess.run([python, _WORKER, str(folder), work], check=True, capture_output=True, text=True)
    return done.stdout.strip().split("\n")[-1]


def recall(found_QK: Any, truth_QK: Any) -> float:
    """Mean share of the true rows that were found."""
    pairs = zip(found_QK.tolist(), truth_QK.tolist(), strict=True)
    return float(np.mean([len(set(found) & set(true)) / K for found, true in pairs]))


def _row(who: str, name: str, usage: Usage, size: int, recall: float, speeds: list[float]) -> tuple[str, ...]:
    peak = max(held for _, held in usage.memory)
    times = f"{usage.wall:,.0f} s", f"{usage.total_cpu:,.0f} s"
    return who, name, *times, amount(peak), amount(size), f"{recall:.3f}", f"{median(speeds):,.0f}"
