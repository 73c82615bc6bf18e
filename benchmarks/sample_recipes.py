"""What the two recipes of the sample were chosen among: towers, sizes, batches and texts, at two minutes a student.

Runs are kept in --out: one that is there is not trained again, so the table can be filled in pieces.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import machine, table
from dimefm.sample import sample_dir
from dimefm.system.machine import describe
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample, sample_paper
from dimefm.training.train import train

_Recipe = Callable[[str, str, str], TrainConfig]
VARIANTS: dict[str, tuple[_Recipe, dict[str, Any]]] = {
    "sample": (sample, {}),
    "sample, lr 0.01": (sample, {"lr": 0.01}),
    "sample, AdamW, cosine": (sample, {"optimizer": "adamw", "lr": 8e-3, "loss": LossConfig(vl=0, pvl=0, cosine=1)}),
    "sample, batches of 64": (sample, {"batch_size": 64}),
    "sample, 40 px, 15 epochs": (sample, {"image_size": 40, "epochs": 15}),
    "sample, 64 px, 7 epochs": (sample, {"image_size": 64, "epochs": 7}),
    "sample, ResNet-10-T, 4 epochs": (sample, {"student": "resnet10t", "epochs": 4}),
    "sample-paper": (sample_paper, {}),
    "sample-paper, batches of 64": (sample_paper, {"batch_size": 64}),
    "sample-paper, 8,192 sentences": (sample_paper, {"texts_per_step": 8192}),
    "sample-paper, learned scale from 50": (sample_paper, {"loss": LossConfig(logit_scale="learned", scale=50)}),
    "sample-paper, any sentences": (sample_paper, {"text_mix": TextMix(), "selection": None}),
    "sample-paper, 64 px, 7 epochs": (sample_paper, {"image_size": 64, "epochs": 7}),
    "sample-paper, ResNet-10-T, 4 epochs": (sample_paper, {"student": "resnet10t", "epochs": 4}),
}


@click.command()
@click.option("--job", default="runs/sample", show_default=True, help="The folder of make reproduce.")
@click.option("--out", default="runs/sample-recipes", show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="These alone; may be repeated.")
def sample_recipes(job: str, out: str, seeds: int, only: tuple[str, ...]) -> None:
    """Students of the sample by recipe: images seen, images/s, zero-shot top-1."""
    stores = (f"{job}/images.zarr", f"{job}/texts.zarr")
    val = tuple(str(sample_dir() / "eval" / name) for name in ("cifar10", "caltech101"))
    rows = []
    for name in only or VARIANTS:
        recipe, changes = VARIANTS[name]
        found, rates = [], []
        for seed in range(seeds):
            config = recipe(*stores, str(Path(out) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"))
            config = replace(config, selection=f"{job}/texts.selection" if recipe is sample_paper else None)
            config = replace(config, seed=seed, val=val, val_texts=f"{job}/prompts.zarr", **changes)
            config = replace(config, val_every=config.epochs, warmup_epochs=config.epochs / 20)
            found.append(train(config).validation)
            lines = [line for line in read_metrics(config.out) if line["event"] == "train"]
            rates.append(statistics.median(line["images_per_second"] for line in lines))
        seen = lines[-1]["step"] * config.batch_size
        cells = [" ".join(f"{scores[Path(path).name]:.3f}" for scores in found) for path in val]
        rows.append((name, f"{seen:,}", f"{statistics.median(rates):,.0f}", *cells))
        click.echo(table(("recipe", "images seen", "images/s", "cifar10", "caltech101"), rows))
    click.echo(f"{machine()}, {describe('cpu')}; top-1 at the end, seeds 0-{seeds - 1}")
