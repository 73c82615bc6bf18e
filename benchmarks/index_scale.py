"""An index over millions of rows: what building takes, how it searches, and what the sizes say of a larger one.

The rows are synthetic (`benchmarks.grown`): of real embeddings' shape, by fixed seeds. What is measured of a size is
kept beside its index, and a run that was stopped goes on; the usage of all its builds is added up. Q queries, D width.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.grown import grow
from benchmarks.measure import machine, median, table
from benchmarks.processes import run
from dimefm.retrieval.choose_index import IndexPlan, build_products, plan_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_search import IndexSearch
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.recall import RECALL_K, RecallQueries
from dimefm.store.embedding_store import Store
from dimefm.system.progress import amount

_DIM, _IMAGES = 768, 16384
_SEED = 1_000_003  # of queries other than those that the index was tuned with
_HEAD = (
    "rows", "index", "build", "its CPU time", "peak memory", "size", "queries",
    "parameters", f"recall@{RECALL_K}", "queries/s", "exact, queries/s",
)  # fmt: skip


@click.command()
@click.option("--texts", required=True, help="Real text store to grow from.")
@click.option("--images", required=True, help="Real image store: queries are grown from it.")
@click.option("--rows", multiple=True, type=int, default=(500_000, 2_000_000, 10_000_000), show_default=True)
@click.option("--folder", required=True, help="Where the stores and indexes are made and kept.")
@click.option("--memory", default="4GB", show_default=True, help="What build-index may take.")
@click.option("--queries", default=1000, show_default=True)
def index_scale(texts: str, images: str, rows: tuple[int, ...], folder: str, memory: str, queries: int) -> None:
    """Indexes over millions of rows: build, memory, recall and queries/s by size, and the curve beyond."""
    base = Path(folder)
    asked = grow(images, base / "queries.zarr", "image", _IMAGES, _DIM, seed=1)
    measured = []
    for count in rows:
        store = grow(texts, base / f"texts-{count}.zarr", "text", count, _DIM, seed=0)
        built = _build(base, store, memory)
        built["searches"] = [_search(base, store, kind, queries) for kind in (asked, store)]
        measured.append(built)
        click.echo(table(_HEAD, [row for one in measured for row in _rows(one)]))
    click.echo(_beyond(measured, 28_400_000, 12_000_000_000))
    seeds = f"rows grown by seed 0 from {Path(texts).name}, images by seed 1 from {Path(images).name}, seed {_SEED}"
    click.echo(f"{machine()}; build-index --memory {memory}; {queries:,} queries of each kind; {seeds}")


def _build(base: Path, store: Store, memory: str) -> dict[str, Any]:
    """The index over a store, built where it is not there yet, and what all runs of that took."""
    rows = store.schema.rows
    index, kept = base / f"texts-{rows}.index", base / f"texts-{rows}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"wall": 0.0, "cpu": 0.0, "memory": 0}
    if not (index / "index.json").exists():
        words = ["build-index", store.path, "--out", str(index), "--memory", memory]
        usage = run([sys.executable, "-m", "dimefm", *words, "--queries", str(base / "queries.zarr")], memory=True)
        found["wall"] += usage.wall
        found["cpu"] += usage.total_cpu
        found["memory"] = max(found["memory"], *usage.own)
        kept.write_text(json.dumps(found))
    sidecar = read_sidecar(str(index))
    return {**found, "rows": rows, "factory": sidecar.factory, "train_rows": sidecar.train_rows, "bytes": sidecar.bytes}


def _search(base: Path, store: Store, asked: Store, count: int) -> dict[str, Any]:
    """Recall and queries/s of the index, and of exact search, with queries that it was not tuned with."""
    rng = np.random.default_rng(_SEED)
    drawn_Q = np.sort(rng.choice(asked.schema.rows, min(count, asked.schema.rows), replace=False))
    vectors_QD = asked.gather(drawn_Q).astype(np.float32)
    began = time.perf_counter()
    exact = ExactSearch(store).search(vectors_QD, RECALL_K + 1)
    exact_speed = len(drawn_Q) / (time.perf_counter() - began)
    own_Q = drawn_Q if asked is store else np.full(len(drawn_Q), -1)
    kind = asked.schema.kind
    queries = RecallQueries(kind, vectors_QD, own_Q, *exact)
    index = IndexSearch.open(str(base / f"texts-{store.schema.rows}.index"), store).of_kind(kind)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        found = index.search(vectors_QD, RECALL_K + 1)
        seconds.append(time.perf_counter() - began)
    tuned = read_sidecar(str(base / f"texts-{store.schema.rows}.index")).search_of(kind)
    parameters = f"nprobe {(tuned.search_parameters or {}).get('nprobe')}, x{tuned.rescore}"
    speed = len(drawn_Q) / median(seconds)
    return {
        "kind": kind,
        "parameters": parameters,
        "recall": queries.recall(*found),
        "speed": speed,
        "exact": exact_speed,
    }


def _rows(one: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of the table for each kind of query."""
    took = (f"{one['wall']:,.0f} s", f"{one['cpu']:,.0f} s", amount(one["memory"]), amount(one["bytes"]))
    found = []
    for place, search in enumerate(one["searches"]):
        facts = (f"{one['rows']:,}", one["factory"], *took) if place == 0 else ("",) * 6
        speeds = (f"{search['speed']:,.0f}", f"{search['exact']:,.1f}")
        found.append((*facts, search["kind"], search["parameters"], f"{search['recall']:.3f}", *speeds))
    return found


def _beyond(measured: list[dict[str, Any]], rows: int, memory: int) -> str:
    """What the sizes say of a larger index: CPU time by products and rows, bytes by rows, memory beside it."""
    plan = plan_index(rows, _DIM, memory)
    work = np.array([_work(one["rows"], one["train_rows"], one["factory"]) for one in measured])
    scale = work.max(axis=0)
    parts, *_ = np.linalg.lstsq(work / scale, np.array([one["cpu"] for one in measured]), rcond=None)
    if (parts < 0).any():  # the rows' own share is lost in the noise of the machine
        parts = np.array([np.mean([one["cpu"] for one in measured] / work[:, 0]) * scale[0], 0])
    cpu = float(_work(rows, plan.train_rows, plan.factory) / scale @ parts)
    largest = max(measured, key=lambda one: int(one["rows"]))
    size = rows * largest["bytes"] / largest["rows"]
    beside = max(one["memory"] - one["bytes"] for one in measured)
    what = f"{rows:,} rows by these: {plan.factory}, {cpu / 3600:.1f} CPU hours, {amount(size)}"
    return f"{what}, at most {amount(size + beside)} of memory"


def _work(rows: int, train_rows: int, factory: str) -> np.ndarray[Any, Any]:
    """What a build's time goes by: products of rows with centroids, and rows."""
    return np.array([build_products(rows, IndexPlan(factory, train_rows, 0, 0)), rows], np.float64)
