"""The stores that `python -m benchmarks recipes` trains from: the same images whole, and in views of each kind."""

import shutil
import subprocess
import sys
from pathlib import Path

import click

from dimefm.sample import sample_dir

_VIEWS = ("--view-scale", "0.6")
STORES: dict[str, list[str]] = {  # by name: the options of cache-images
    "whole": [],
    "views1": ["--views", "1", *_VIEWS],
    "views4": ["--views", "4", *_VIEWS],
    "views16": ["--views", "16", *_VIEWS],
    "strong4": ["--views", "4", "--augment", "strong", *_VIEWS],
    "strong16": ["--views", "16", "--augment", "strong", *_VIEWS],
    "mixed4": ["--views", "4", "--augment", "strong", "--mixup", "1", *_VIEWS],
    "second": [],
    "second-strong4": ["--views", "4", "--augment", "strong", *_VIEWS],
}
_GROWN = {"views4": "views1", "views16": "views4", "strong16": "strong4"}  # its first views need not be encoded again


@click.command()
@click.option("--images", multiple=True, help="Sources of images. Default: the sample's.")
@click.option("--texts", multiple=True, help="Sources of sentences. Default: the sample's.")
@click.option("--teacher", help="Default: the sample's.")
@click.option("--second", default="runs/second-teacher", show_default=True, help="Teacher of the stores second*.")
@click.option("--out", default="runs/recipe-stores", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(STORES)), help="These alone; may be repeated.")
@click.option("--precision", default="bf16", show_default=True, help="Of the teacher, on the images.")
def recipe_stores(
    images: tuple[str, ...], texts: tuple[str, ...], teacher: str | None, second: str, out: str, only: tuple[str, ...],
    precision: str,
) -> None:  # fmt: skip
    """Cache images whole and in views, and sentences; what was stopped goes on."""
    shipped, base = sample_dir(), Path(out)
    teacher = teacher or f"local-dir:{shipped / 'teacher'}"
    pictures = images or tuple(map(str, sorted((shipped / "images").glob("train-*.tar"))))
    sentences = texts or tuple(map(str, sorted((shipped / "texts").glob("*"))))
    _dimefm("cache-texts", *sentences, "--out", str(base / "texts.zarr"), "--teacher", teacher)
    for name in only or STORES:
        store, first = base / f"{name}.zarr", base / f"{_GROWN.get(name)}.zarr"
        if not store.exists() and first.exists():
            shutil.copytree(first, store)
        whose = f"local-dir:{second}" if name.startswith("second") else teacher
        how = ("--teacher", whose, "--precision", precision, "--pixels", "72", *STORES[name])
        _dimefm("cache-images", *pictures, "--out", str(store), *how)


def _dimefm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dimefm", *words, "--quiet"], check=True)
