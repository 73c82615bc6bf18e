"""Reading the store: zarr-python against the memory maps, in sequence and at random; and its commits, which every
process of a run reads at its start."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import zarr

from benchmarks.measure import machine, median, ratio, rounds, table
from cache_schemas import Commit, Failure, Status
from cache_schemas.embedding_store import commit_path
from dimefm.store.commit import make_commit, read_failures, write_commit
from dimefm.store.mapped_array import MappedArray
from dimefm.store.zarr_arrays import create_array
from dimefm.system import storage

_SHARD, _SHARDS = 65536, 611  # of the paper's images


@click.command()
@click.option("--rows", default=200_000, show_default=True)
@click.option("--dim", default=768, show_default=True)
@click.option("--count", default=7, show_default=True, help="Rounds.")
def store_reads(rows: int, dim: int, count: int) -> None:
    """Embeddings read through Zarr and through maps."""
    with tempfile.TemporaryDirectory() as folder:
        array = _write(Path(folder), rows, dim)
        mapped = MappedArray.open(folder, "embedding", array)
        assert mapped is not None
        chosen = np.random.default_rng(0).integers(0, rows, 1024)
        block = min(rows, 65536)
        sequential = rounds({"zarr": lambda: array[:block], "maps": lambda: mapped.read(0, block)}, count)
        gather = rounds({"zarr": lambda: array.oindex[chosen], "maps": lambda: mapped.gather(chosen)}, count)
    size = block * dim * 2 / 1e9
    lines = [
        ("in sequence, GB/s", *(f"{size / median(sequential[k]):.2f}" for k in ("zarr", "maps")), sequential),
        ("1,024 random rows, rows/s", *(f"{1024 / median(gather[k]):,.0f}" for k in ("zarr", "maps")), gather),
    ]
    body = [(name, a, b, f"{ratio(times['zarr'], times['maps']):.1f}") for name, a, b, times in lines]
    click.echo(table(("read", "zarr-python", "maps", "ratio"), body))
    click.echo(f"{machine()}; {rows:,} x {dim} float16, warm, medians of {count} paired rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        failed = [_commits(Path(folder), failures, count) for failures in (0, 16, 17, _SHARD // 10, _SHARD)]
    heads = ("rows of a shard that failed", "its commit, ms", f"{_SHARDS} commits, s", "and why, ms", "all in JSON, ms")
    click.echo(table(heads, failed))


def _write(folder: Path, rows: int, dim: int) -> zarr.Array:
    group = zarr.open_group(str(folder), mode="a")
    create_array(group, "embedding", (rows, dim), "float16", (1024, dim), 16384)
    array = group["embedding"]
    rng = np.random.default_rng(0)
    for start in range(0, rows, 16384):
        stop = min(start + 16384, rows)
        array[start:stop] = rng.standard_normal((stop - start, dim), dtype=np.float32).astype(np.float16)
    assert isinstance(array, zarr.Array)
    return array


def _commits(folder: Path, failed: int, count: int) -> tuple[str, ...]:
    """Times of a commit of so many failures: as it is written, with its failures, and with all of them in its JSON, as
    older stores have it."""
    failures = [Failure(row=row, key=f"train/{row:09d}", file=f"/data/images-{row // 10_000:05d}.tar", status="MISSING",
                        reason="No such file or directory") for row in range(failed)]  # fmt: skip
    status_N = np.repeat(np.array([Status.MISSING, Status.OK], np.uint8), [failed, _SHARD - failed])
    commit = make_commit(failed, 0, status_N, failures, digest="0" * 64, device="cpu", seconds=1.0)
    storage.write_json(str(folder / f"{failed}.json"), commit.to_json())
    write_commit(str(folder), commit)

    times = 256 if failed < 256 else 1  # of each in a round, for a share in Python's collecting of garbage

    def read(name: str) -> Commit:
        return Commit.parse(storage.read_json(str(folder / name)), name)

    def repeat(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(times)][-1]

    path = commit_path(failed)
    reads = {"commit": repeat(lambda: read(path)), "JSON": repeat(lambda: read(f"{failed}.json")),
             "all": repeat(lambda: list(read_failures(str(folder), read(path))))}  # fmt: skip
    found = {name: median(spent) / times for name, spent in rounds(reads, count).items()}
    whole, everything, old = (f"{1e3 * found[name]:,.2f}" for name in ("commit", "all", "JSON"))
    return f"{failed:,}", whole, f"{_SHARDS * found['commit']:.2f}", everything, old
