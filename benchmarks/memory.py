"""Memory of cache-images over many images: of all its processes together, it must not grow with what is done."""

import statistics
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.measure import machine, table
from benchmarks.processes import run
from benchmarks.stage1 import trivial_teacher
from dimefm.sample import sample_dir


@click.command()
@click.option("--rows", default=100_000, show_default=True, help="Images, at least: the sample's tars are repeated.")
def memory(rows: int) -> None:
    """Memory of cache-images by tenth of a long run, with a teacher that costs nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = sorted((sample_dir() / "images").iterdir())
        (folder / "images").mkdir()
        copies = -(-rows // 5268)
        for copy in range(copies):
            for tar in tars:
                (folder / "images" / f"{copy:03d}-{tar.name}").symlink_to(tar)
        teacher = f"local-dir:{trivial_teacher(folder / 'teacher')}"
        words = [sys.executable, "-m", "dimefm", "cache-images", str(folder / "images")]
        usage = run([*words, "--out", str(folder / "out.zarr"), "--teacher", teacher, "--device", "cpu"], memory=True)
    lines = []
    for tenth in range(10):
        chosen = [m for t, m in usage.memory if tenth <= 10 * t / usage.wall < tenth + 1]
        lines.append((f"{tenth + 1}", f"{statistics.median(chosen) / 1e9:.2f} GB", f"{max(chosen) / 1e9:.2f} GB"))
    click.echo(table(("tenth of the run", "median", "peak"), lines))
    click.echo(f"{machine()}; {copies * 5268:,} images in {usage.wall:,.0f} s, proportional set size of all processes")
