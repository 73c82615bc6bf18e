"""An index over tens of millions of rows: build, memory, recall and queries/s by size, and the curve beyond."""

from pathlib import Path

import click

from benchmarks.grown import grow


@click.command()
@click.option("--texts", required=True, help="Real text store to grow from.")
@click.option("--images", required=True, help="Real image store: queries are grown from it.")
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--folder", required=True, help="Where the stores are made and kept.")
def index_scale(texts: str, images: str, rows: int, folder: str) -> None:
    """An index over tens of millions of rows."""
    base = Path(folder)
    grow(images, base / "queries.zarr", "image", 16384, 768, seed=1)
    grow(texts, base / f"texts-{rows}.zarr", "text", rows, 768, seed=0)
