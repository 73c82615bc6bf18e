"""Sentences made into tokens by open_clip's tokenizer and by ours, on one core."""

import gzip
import statistics
import time
from collections.abc import Callable

import click
import open_clip
import torch

from benchmarks.measure import machine, table
from dimefm.models.tokenizer import fast_tokenizer
from dimefm.sample import sample_dir


@click.command()
@click.option("--count", default=5, show_default=True, help="Rounds.")
@click.option("--sentences", default=20_000, show_default=True)
def tokens(count: int, sentences: int) -> None:
    """Sentences/s of open_clip's tokenizer and of ours: captions, film reviews, and twelve captions in one."""
    theirs = open_clip.get_tokenizer("ViT-B-32")
    texts = sample_dir() / "texts"
    captions = _lines(texts / "visual_coco_val2017.txt.gz")[:sentences]
    kinds = {
        "captions": captions,
        "film reviews": _lines(texts / "nonvisual_film_reviews.txt.gz")[:sentences],
        "twelve captions in one": [" ".join(captions[at : at + 12]) for at in range(0, len(captions), 12)],
    }
    rows = []
    for kind, some in kinds.items():
        ours = fast_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
        first = _seconds(ours, some)
        pairs = [(_seconds(theirs, some), _seconds(ours, some)) for _ in range(count)]
        if not torch.equal(theirs(some), ours(some)):
            raise click.ClickException(f"{kind}: not open_clip's tokens")
        known, new = (statistics.median(column) for column in zip(*pairs, strict=True))
        times = statistics.median(a / b for a, b in pairs)
        rates = [f"{len(some) / seconds:,.0f}" for seconds in (known, new, first)]
        rows.append((kind, f"{len(some):,}", *rates, f"{times:.1f}x"))
    click.echo(table(("", "sentences", "open_clip's /s", "ours /s", "ours, first time", ""), rows))
    click.echo(f"{machine()}; CPU time, medians of {count} paired rounds; the tokens are the same")


def _lines(path: object) -> list[str]:
    with gzip.open(str(path), "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def _seconds(tokenizer: Callable[[list[str]], torch.Tensor], some: list[str]) -> float:
    began = time.process_time()
    tokenizer(some)
    return time.process_time() - began
