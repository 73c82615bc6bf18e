"""Reading the store: zarr-python against the memory maps, in sequence and at random."""

import tempfile
from pathlib import Path

import click
import numpy as np
import zarr

from benchmarks.measure import machine, median, ratio, rounds, table
from dimefm.arrays import create_array
from dimefm.mapped import MappedArray


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
    click.echo(f"{machine()}; {rows:,} x {dim} float16, warm, medians of {count} paired rounds")


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
