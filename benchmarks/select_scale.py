"""`select-texts` over finished stores of the paper's size: time, and memory of all its processes.

The choice by hits, and the draw, are measured whole, over simulated stores. Scores, clusters and repetitions cost hours
on a CPU: for each sentence the same (scores), or in proportion to the root of their number (the other two). They are
measured over a part, whose sentences are grown from real ones, so that they cluster and repeat each other as those do.

Shapes: N image rows of a shard, K sentences per image, T sentences.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.grown import grow
from benchmarks.measure import machine, table
from benchmarks.processes import Usage, run
from benchmarks.simulated import simulate
from cache_schemas import PairsStore, Status
from cache_schemas.pairs import SCORE, TEXT_ROW
from dimefm.retrieval.retrieve import write_pairs
from dimefm.store.commit import make_commit, write_commit
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import is_planned
from dimefm.store.pairs_store import Pairs
from dimefm.store.zarr_arrays import digest_arrays, write_rows
from dimefm.system.progress import Progress

_TOP_K, _SPREAD = 16, 2.5
_LINEAR, _ROOT = 1.0, 1.5  # cost by sentences, to this power


@click.command()
@click.option("--images", default=40_000_000, show_default=True)
@click.option("--texts", default=28_400_000, show_default=True)
@click.option("--part", default=1_000_000, show_default=True, help="Sentences that are scored, clustered, compared.")
@click.option("--real", help="Finished text store from which the part is grown. Default: random embeddings.")
@click.option("--dim", default=768, show_default=True)
@click.option("--images-sample", default=16_384, show_default=True)
@click.option("--workers", type=int, help="For the part, on a local Ray.")
@click.option("--only", multiple=True, help="Cases whose name contains this.")
@click.option("--folder", help="Where the stores are, or are made and kept. Default: a temporary folder.")
def select_scale(
    images: int,
    texts: int,
    part: int,
    real: str | None,
    dim: int,
    images_sample: int,
    workers: int | None,
    only: tuple[str, ...],
    folder: str | None,
) -> None:
    """select-texts over 28.4M sentences and 40M images: time and memory of each way to select."""
    ray = ["--workers", str(workers)] if workers else []
    sample, third = ["--by", "similarity", "--images-sample", str(images_sample)], str(part // 3)
    cases: dict[str, tuple[bool, float, list[str]]] = {  # over the whole or the part, how the cost grows, options
        "by hits, the union": (True, _LINEAR, []),
        "by hits, --min-hits 2, about a third": (True, _LINEAR, ["--min-hits", "2", "--size", str(texts // 3)]),
        "at random, about a third": (True, _LINEAR, ["--by", "random", "--size", str(texts // 3)]),
        f"by similarity to {images_sample:,} images": (False, _LINEAR, [*sample, "--size", third, *ray]),
        "--dedup 0.98": (False, _ROOT, ["--by", "random", "--dedup", "0.98", *ray]),
        "--balance, a third": (False, _ROOT, ["--by", "random", "--balance", "--size", third, *ray]),
    }
    cases = {name: case for name, case in cases.items() if not only or any(word in name for word in only)}
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(folder or temporary)
        for name, (whole, power, options) in cases.items():
            pairs = _whole(base, images, texts, dim) if whole else _part(base, part, dim, real)
            usage = _select(base, pairs, options)
            rows = texts if whole else part
            lines.append((name, f"{rows:,}", *_figures(usage, (texts / rows) ** power)))
            click.echo(f"{lines[-1]}", err=True)
    head = ("selection", "sentences", "wall", "CPU", f"CPU for {texts:,}", "peak of own memory", "with files")
    click.echo(table(head, lines))
    about = f"{images:,} images, top {_TOP_K}; {dim} wide; the part {'grown from real ones' if real else 'random'}"
    click.echo(f"{machine()}; {about}; {workers or 'no'} workers on Ray")


def _figures(usage: Usage, factor: float) -> tuple[str, ...]:
    own, everything = max(usage.own, default=0), max((held for _, held in usage.memory), default=0)
    seconds = (usage.wall, usage.total_cpu, usage.total_cpu * factor)
    return (*(f"{s:,.0f} s" for s in seconds), f"{own / 1e9:.2f} GB", f"{everything / 1e9:.2f} GB")


def _select(base: Path, pairs: str, options: list[str]) -> Usage:
    out = base / "chosen.selection"
    shutil.rmtree(out, ignore_errors=True)
    try:
        return run([sys.executable, "-m", "dimefm", "select-texts", pairs, "--out", str(out), *options], memory=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _whole(base: Path, images: int, texts: int, dim: int) -> str:
    for name, kind, rows in (("images", "image", images), ("texts", "text", texts)):
        simulate(base / f"{name}.zarr", kind, rows, dim, [])
    return _pairs(base / "pairs.zarr", Store(str(base / "images.zarr")), Store(str(base / "texts.zarr")))


def _part(base: Path, rows: int, dim: int, real: str | None) -> str:
    texts, images = base / f"texts-{rows}.zarr", base / f"images-{rows}.zarr"
    if real is not None:
        grow(real, texts, "text", rows, dim, seed=0)
    else:
        simulate(texts, "text", rows, dim, [])
    simulate(images, "image", max(rows, 65_536), dim, [])
    return _pairs(base / f"pairs-{rows}.zarr", Store(str(images)), Store(str(texts)))


def _pairs(path: Path, images: Store, texts: Store) -> str:
    """Finished pairs, drawn at random: how often a sentence is hit has a log-normal distribution, so that some are hit
    by every hundredth image and two fifths by none. What an earlier run left is gone on with."""
    schema = PairsStore(
        images=images.path, images_identity=images.schema.identity, texts=texts.path,
        texts_identity=texts.schema.identity, index="simulated", index_digest="simulated", top_k=_TOP_K,
        rows=images.schema.rows, text_rows=texts.schema.rows, shard_rows=images.schema.shard_rows,
        texts_data=texts.contents.digest,
    )  # fmt: skip
    pairs = Pairs(str(path)) if is_planned(str(path)) else Pairs.create(str(path), schema)
    pending = sorted(set(range(schema.shards)) - pairs.committed())
    if pending:
        weight_T = np.random.default_rng(0).lognormal(sigma=_SPREAD, size=schema.text_rows)
        bounds_T = np.cumsum(weight_T)
        with Progress("pairing", schema.rows, "image") as bar:
            for shard in pending:
                _write_pairs(pairs, shard, bounds_T, images.contents.shards[str(shard)])
                bar.at(schema.shard_range(shard)[1])
    began = time.perf_counter()
    nothing: Any = None  # all shards are there: only their hits are counted, if they are not yet
    write_pairs(images, texts, nothing, index="simulated", index_digest="simulated", top_k=_TOP_K, out=str(path))
    click.echo(f"hits of {schema.rows:,} images: {time.perf_counter() - began:,.1f} s", err=True)
    return str(path)


def _write_pairs(pairs: Pairs, shard: int, bounds_T: np.ndarray, images: str | None) -> None:
    start, stop = pairs.schema.shard_range(shard)
    rng = np.random.default_rng((1, shard))
    drawn = np.sort(rng.random((stop - start) * _TOP_K)) * bounds_T[-1]  # in order they are found ten times as fast
    row_NK = rng.permutation(np.searchsorted(bounds_T, drawn)).astype(np.int32).reshape(-1, _TOP_K)
    score_NK = np.sort(rng.uniform(0.15, 0.35, row_NK.shape), axis=1)[:, ::-1].astype(np.float16)
    for name, values in ((TEXT_ROW, row_NK), (SCORE, score_NK)):
        write_rows(pairs.path, f"{name}/c/{shard}/0", pairs.group[name], start, values)
    status_N = np.full(len(row_NK), Status.OK, np.uint8)
    commit = make_commit(
        shard, start, status_N, (), digest=digest_arrays(row_NK, score_NK), device="none", seconds=0, images=images
    )
    write_commit(pairs.path, commit)
