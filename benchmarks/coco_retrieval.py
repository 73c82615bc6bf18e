"""Image and text retrieval of models on pairs of an image and several captions: tars of key.jpg and key.txt."""

import statistics
import tempfile
from pathlib import Path

import click

from benchmarks.measure import machine, table
from dimefm.datasets.own_sets import open_folder
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate

_DEPTHS = (1, 5, 10)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", required=True, help="Folder of tars: key.jpg, and key.txt with a caption a line.")
@click.option("--group", is_flag=True, help="One line for runs that differ in their last number, the seed.")
def coco_retrieval(models: tuple[str, ...], data: str, group: bool) -> None:
    """R@1, R@5 and R@10 in per cent, image to text and text to image; runs, folders or open_clip names."""
    captions = open_folder(data).captions or ()
    found: dict[str, list[list[float]]] = {}
    for model in models:
        name = Path(model).name
        name = (name.rpartition("-")[0] if group else "") or name
        found.setdefault(name, []).append(_recalls(model, data))
    head = ("model", *(f"{way} R@{depth}" for way in ("image to text", "text to image") for depth in _DEPTHS))
    rows = [(name, *(_spread(column) for column in zip(*values, strict=True))) for name, values in found.items()]
    click.echo(table(head, rows))
    click.echo(f"{machine()}; {len(captions)} images, {sum(map(len, captions))} captions")


def _recalls(model: str, data: str) -> list[float]:
    """An image counts where any caption of its own is among the first; a caption where its image is."""
    with tempfile.TemporaryDirectory() as out:
        done = evaluate(EvaluationConfig(model=model, folders=(data,), out=out, decoder="fast", device="cpu"))
    if done.failed:
        raise done.failed[0][1]
    metrics = done.results[0].metrics
    return [100 * metrics[f"{way}_retrieval_recall@{k}"] for way in ("text", "image") for k in _DEPTHS]


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
