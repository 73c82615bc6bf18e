"""How long `verify` takes over a store of millions of rows, in one process and with workers on Ray."""

import sys
import tempfile
from pathlib import Path

import click

from benchmarks.measure import machine, median, ratio, table
from benchmarks.processes import Usage, run
from benchmarks.simulated import simulate

_TARGET_ROWS, _TARGET_DIM = 40_000_000, 768
_TINY_ROWS = 512


@click.command()
@click.option("--rows", default=2_000_000, show_default=True)
@click.option("--dim", default=_TARGET_DIM, show_default=True)
@click.option("--store", type=click.Path(exists=True, file_okay=False), help="Real store, in place of a simulated one.")
@click.option("--workers", default=2, show_default=True)
@click.option("--rounds", "count", default=3, show_default=True)
def verify_scale(rows: int, dim: int, store: str | None, workers: int, count: int) -> None:
    """Rate, CPU time and memory of verify, alone and with --workers.

    A simulated store is read from memory: its shards are hard links to one. What a store of one small shard takes, of
    which almost all is the start, is taken off before the rate is computed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"whole": Path(store) if store else folder / "images.zarr", "tiny": folder / "tiny.zarr"}
        if not store:
            simulate(places["whole"], "image", rows, dim, [])
        simulate(places["tiny"], "image", _TINY_ROWS, dim, [])
        size = sum(path.stat().st_size for path in places["whole"].rglob("*") if path.is_file())
        options = {"1 process": [], f"{workers} workers": ["--workers", str(workers)]}
        used: dict[tuple[str, str], list[Usage]] = {(how, what): [] for how in options for what in places}
        for _ in range(count):
            for how, what in used:
                words = [sys.executable, "-m", "dimefm", "verify", str(places[what]), "--quiet", *options[how]]
                used[how, what].append(run(words, memory=True))
    target = _TARGET_ROWS * _TARGET_DIM * 2
    lines, walls = [], {}
    for how in options:
        pairs = list(zip(used[how, "whole"], used[how, "tiny"], strict=True))
        walls[how] = [whole.wall - tiny.wall for whole, tiny in pairs]
        seconds, cpu = median(walls[how]), median([whole.total_cpu - tiny.total_cpu for whole, tiny in pairs])
        start, peak = median([tiny.wall for _, tiny in pairs]), max(m for whole, _ in pairs for _, m in whole.memory)
        lines.append(
            (
                how,
                f"{start:.1f} s",
                f"{seconds:.1f} s",
                f"{size / seconds / 1e9:.2f} GB/s",
                f"{cpu / size * 1e9:.2f} s",
                f"{peak / 1e9:.2f} GB",
                f"{target / size * seconds / 60:.1f} min",
            )
        )
    head = ("verify", "start", "then", "rate", "CPU per GB", "peak memory of all processes", "40M x 768")
    click.echo(table(head, lines))
    one, several = (walls[how] for how in options)
    what = f"{store or 'simulated images'}, {size / 1e9:.2f} GB"
    click.echo(f"{workers} workers: {ratio(one, several):.2f} times as fast; {what}; {count} rounds; {machine()}")
