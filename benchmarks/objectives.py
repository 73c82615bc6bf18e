"""Which objective trains the best student at a small budget: a ResNet-10-T with several losses, at equal steps.

Runs are kept in --out: one that is there is not trained again, so the table can be filled in pieces.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import machine, table
from benchmarks.small_student import resnet10
from dimefm.sample import sample_dir
from dimefm.training.config import LossConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.train import train

PAPER, CENTRED = LossConfig(vl=0.7, pvl=0.3), LossConfig(vl=0, pvl=0, centred=1)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "paper-TB": {"loss": PAPER, "texts_per_step": 64},
    "vl-TB": {"loss": LossConfig(vl=1, pvl=0), "texts_per_step": 64},
    "udist-TB": {"loss": LossConfig(vl=0.7, pvl=0.3, udist=0.1), "texts_per_step": 64},
    "paper-4B": {"loss": PAPER, "texts_per_step": 256},
    "paper-16B": {"loss": PAPER, "texts_per_step": 1024},
    "paper-32B": {"loss": PAPER},
    "paper-masked": {"loss": LossConfig(mask_diagonal=True)},
    "paper-learned": {"loss": LossConfig(logit_scale="learned", scale=50)},
    "paper-queue": {"loss": LossConfig(queue=4096)},
    "vl4": {"loss": LossConfig(vl=1, pvl=0, vl_temperature=4, square_temperature=True)},
    "vl10": {"loss": LossConfig(vl=1, pvl=0, vl_temperature=10, square_temperature=True)},
    "cosine": {"loss": LossConfig(vl=0, pvl=0, cosine=1)},
    "centred": {"loss": CENTRED},
    "centred-ema": {"loss": CENTRED, "ema": 0.998},
    "centred+paper": {"loss": LossConfig(vl=0.014, pvl=0.006, centred=1)},
}


@click.command()
@click.option("--images", default="runs/sample/images.zarr", show_default=True, help="Image store.")
@click.option("--texts", default="runs/sample/texts.zarr", show_default=True, help="Text store.")
@click.option("--val", multiple=True, help="Labelled sets. Default: the sample's.")
@click.option("--val-texts", default="runs/sample/prompts.zarr", show_default=True, help="Text store of their prompts.")
@click.option("--out", default="runs/objectives", show_default=True)
@click.option("--epochs", default=30.0, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(OBJECTIVES)), help="These alone; may be repeated.")
def objectives(
    images: str, texts: str, val: tuple[str, ...], val_texts: str, out: str, epochs: float, seeds: int,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    """Students by objective: zero-shot top-1 at the end, and after each quarter of the images."""
    sets = val or tuple(str(sample_dir() / "eval" / name) for name in ("cifar10", "caltech101"))
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in range(seeds):
        for name in only or OBJECTIVES:
            config = dataclasses.replace(
                resnet10(images, texts, str(Path(out) / f"{name}-{epochs:g}-{seed}")),
                epochs=epochs, warmup_epochs=epochs / 20, val=sets, val_texts=val_texts, val_every=epochs / 4,
                seed=seed, workers=0, checkpoint_every=10**6, log_every=100, **OBJECTIVES[name],
            )  # fmt: skip
            train(config)
            lines = [line for line in read_metrics(config.out) if line["event"] == "validation"]
            curves.setdefault(name, []).append(lines)
        click.echo(_table(curves))
    size = dataclasses.asdict(config)["batch_size"]
    seen = ", ".join(f"{line['step'] * size:,}" for line in lines)
    click.echo(f"{machine()}; ResNet-10-T at 64 px, after {seen} images seen, seeds 0-{seeds - 1}")


def _table(curves: dict[str, list[list[dict[str, Any]]]]) -> str:
    first = next(iter(curves.values()))[0][-1]
    sets = [name for name in first if name not in ("event", "step") and not name.endswith("_ema")]
    rows = []
    for name, runs in curves.items():
        cells = [" ".join(_spread([run[point][s] for run in runs], point == 3) for point in range(4)) for s in sets]
        rows.append((name, *cells))
        if all(f"{sets[0]}_ema" in run[-1] for run in runs):
            rows.append((f"{name}: average", *(_spread([run[-1][f"{s}_ema"] for run in runs], True) for s in sets)))
    return table(("objective", *(f"{s}: each quarter" for s in sets)), rows)


def _spread(values: list[float], last: bool) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if last and len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
