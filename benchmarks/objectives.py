"""Which objective trains the best student at a small budget: the sample recipe with other losses, at equal steps."""

import dataclasses
import statistics
import time
from pathlib import Path

import click

from benchmarks.measure import machine, table
from dimefm.objective import LossConfig
from dimefm.recipes import sample
from dimefm.sample import sample_dir
from dimefm.textbank import TextMix
from dimefm.train import train

OBJECTIVES = {
    "paper: 0.7 vl + 0.3 pvl, T = B": {"loss": LossConfig(), "texts_per_step": 64},
    "paper: 0.7 vl + 0.3 pvl, T = 2,048": {"loss": LossConfig()},
    "the same, visually grounded texts": {"loss": LossConfig(), "text_mix": TextMix(random=0, selected=1)},
    "cosine": {"loss": LossConfig(vl=0, pvl=0, cosine=1)},
    "centred": {"loss": LossConfig(vl=0, pvl=0, centred=1)},
    "centred + 0.05 (0.7 vl + 0.3 pvl)": {"loss": LossConfig(vl=0.035, pvl=0.015, centred=1)},
}


@click.command()
@click.option("--cache", default="runs/sample", show_default=True, help="The folder that make reproduce filled.")
@click.option("--out", default="runs/objectives", show_default=True)
@click.option("--epochs", default=30.0, show_default=True)
@click.option("--lr", "rates", multiple=True, type=float, default=(4e-3,), show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--only", multiple=True, help="Objectives whose name contains this.")
def objectives(
    cache: str, out: str, epochs: float, rates: tuple[float, ...], seeds: int, only: tuple[str, ...]
) -> None:
    """Students by objective, zero-shot on the sample's two sets."""
    folder = Path(cache)
    stores = [str(folder / name) for name in ("images.zarr", "texts.zarr")]
    sets = tuple(str(sample_dir() / "eval" / name) for name in ("cifar10", "caltech101"))
    chosen = {n: c for n, c in OBJECTIVES.items() if not only or any(part in n for part in only)}
    rows = []
    for name, changes in chosen.items():
        for lr in rates:
            scores: list[dict[str, float]] = []
            began = time.monotonic()
            for seed in range(seeds):
                run = Path(out) / f"{list(OBJECTIVES).index(name)}-{lr}-{epochs}-{seed}"
                config = dataclasses.replace(
                    sample(*stores, str(run)),
                    val=sets,
                    val_texts=str(folder / "prompts.zarr"),
                    val_every=epochs,
                    epochs=epochs,
                    lr=lr,
                    seed=seed,
                    pairs=str(folder / "pairs.zarr") if "text_mix" in changes else None,
                    **changes,
                )
                scores.append(train(config).validation)
            cells = [_spread([s[n] for s in scores]) for n in ("cifar10", "caltech101")]
            rows.append((name, f"{lr:g}", *cells, f"{(time.monotonic() - began) / seeds:,.0f}"))
            click.echo(table(("objective", "lr", "cifar10 top-1", "caltech101 top-1", "seconds a run"), rows))
    click.echo(f"{machine()}; sample recipe, {epochs:g} epochs, seeds 0-{seeds - 1}")


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
