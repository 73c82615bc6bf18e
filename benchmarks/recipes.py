"""Which recipe trains the best student from one cache: by images seen and by seconds, over seeds, on changed images.

Each run and each evaluation is kept in --out: what is there is not done again, so the table can be filled in pieces.
Half of each set's images, drawn by their keys, are for choosing a recipe; what is reported is of the other half.
"""

import hashlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks.changed_sets import CHANGES, changed_set
from benchmarks.measure import machine, table
from benchmarks.recipe_plot import Outcome, write_plot
from cache_schemas.evaluation import RESULTS_FILE
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.predictions import file_name
from dimefm.evaluation.results import read_results
from dimefm.store.embedding_store import Store
from dimefm.system.allocator import keep_freed_memory
from dimefm.system.machine import describe
from dimefm.training import train as train_module
from dimefm.training.config import LossConfig
from dimefm.training.optimizer import learning_rate
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample

SETS = ("cifar10", "caltech101", "tiny_imagenet_val")
PAIRS = "coco_mini_retrieval"
STUDENTS: dict[str, dict[str, Any]] = {
    "test_resnet": {"student": "test_resnet", "image_size": 48, "batch_size": 32, "lr": 8e-3},
    "resnet10t": {"student": "resnet10t", "image_size": 64, "batch_size": 64, "lr": 4e-3},
    "mobilevit": {"student": "mobilevit_xxs", "image_size": 64, "batch_size": 64, "lr": 2e-3},
    "vit": {"student": str(Path(__file__).with_name("vit_tiny_8.json")), "batch_size": 64, "lr": 1e-3},
}
_PAPER, _CENTRED, _COSINE = {"vl": 0.7, "pvl": 0.3}, {"centred": 1.0}, {"cosine": 1.0}
_BOTH, _MUON = {"cosine": 0.5, "centred": 0.5}, {"optimizer": "muon", "lr": 0.02}
SCHEDULES: dict[str, Callable[[float], float]] = {  # the share of the rate after a part of the steps; else a cosine
    "linear": lambda progress: 1 - progress,
    "constant, then linear": lambda progress: min(1.0, (1 - progress) / 0.4),
}
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # image stores, losses, other fields
    "authors": ("whole", _PAPER, {"texts_per_step": 0}),  # as many as images
    "queue": ("whole", {"pvl": 1.0, "queue": 4096}, {}),
    "centred": ("whole", _CENTRED, {}),
    "cosine": ("whole", _COSINE, {}),
    "both": ("whole", _BOTH, {}),
    "centred, average": ("whole", _CENTRED, {"ema": 0.998}),
    "centred, 1 view": ("views1", _CENTRED, {}),
    "centred, 4 views": ("views4", _CENTRED, {}),
    "centred, 16 views": ("views16", _CENTRED, {}),
    "centred, strong without views": ("whole", _CENTRED, {"augment": "strong"}),
    "centred, 4 strong views": ("strong4", _CENTRED, {}),
    "cosine, 4 strong views": ("strong4", _COSINE, {}),
    "centred, 16 strong views": ("strong16", _CENTRED, {}),
    "centred, 4 strong and mixed views": ("mixed4", _CENTRED, {}),
    "authors, 4 strong views": ("strong4", _PAPER, {"texts_per_step": 0}),
    "both, Muon": ("whole", _BOTH, _MUON),
    "both, Muon, lr 0.003": ("whole", _BOTH, {**_MUON, "lr": 0.003}),
    "both, Muon, lr 0.005": ("whole", _BOTH, {**_MUON, "lr": 0.005}),
    "both, Muon, lr 0.01": ("whole", _BOTH, {**_MUON, "lr": 0.01}),
    "both, Muon, lr 0.04": ("whole", _BOTH, {**_MUON, "lr": 0.04}),
    "both, Muon, linear": ("whole", _BOTH, {**_MUON, "schedule": "linear"}),
    "both, Muon, constant at first": ("whole", _BOTH, {**_MUON, "schedule": "constant, then linear"}),
    "both, Muon, no weight decay": ("whole", _BOTH, {**_MUON, "weight_decay": 0.0}),
    "both, SGD": ("whole", _BOTH, {"optimizer": "sgd", "lr": 0.5, "weight_decay": 5e-4}),
    "both, LAMB": ("whole", _BOTH, {"optimizer": "lamb", "lr": 0.02}),
    "both, NAdamW": ("whole", _BOTH, {"optimizer": "nadamw"}),
    "both, two teachers": ("whole+second", _BOTH, {}),
    "both, AdaMuon": ("whole", _BOTH, {"optimizer": "adamuon", "lr": 4e-3}),
    "both, Muon, 4 views": ("views4", _BOTH, _MUON),
    "both, Muon, 16 views": ("views16", _BOTH, _MUON),
    "both, Muon, 4 strong views": ("strong4", _BOTH, _MUON),
    "both, Muon, 16 strong views": ("strong16", _BOTH, _MUON),
    "both, Muon, 4 strong and mixed views": ("mixed4", _BOTH, _MUON),
    "both, Muon, average": ("whole", _BOTH, {**_MUON, "ema": 0.998}),
    "both, Muon, two teachers": ("whole+second", _BOTH, _MUON),
    "authors, Muon": ("whole", _PAPER, {"texts_per_step": 0, **_MUON}),
    "both and queue": ("whole", {**_BOTH, "pvl": 0.1, "queue": 4096}, {}),
}


@click.command()
@click.option(
    "--stores", default="runs/recipe-stores", show_default=True, help="Folder of the stores, see recipe-stores."
)
@click.option("--data", required=True, type=click.Path(exists=True), help=f"Folder of the sets {', '.join(SETS)}.")
@click.option("--out", default="runs/recipes", show_default=True)
@click.option("--student", "students", multiple=True, type=click.Choice(list(STUDENTS)), default=("test_resnet",))
@click.option("--seen", "budgets", multiple=True, type=int, default=(40_000, 160_000), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(RECIPES)), help="These alone; may be repeated.")
@click.option("--precision", default="auto", show_default=True, help="Of the students' matrix products.")
@click.option("--jobs", default=1, show_default=True, help="Runs at once, each on one thread.")
@click.option("--report", is_flag=True, help="Train nothing: show what is there.")
@click.option("--plot", help="PNG to write, of accuracy by images seen and by seconds.")
@click.option("--one", hidden=True, help="STUDENT:RECIPE:IMAGES:SEED, in this process.")
def recipes(
    stores: str, data: str, out: str, students: tuple[str, ...], budgets: tuple[int, ...], seeds: int,
    only: tuple[str, ...], precision: str, jobs: int, report: bool, plot: str | None,
    one: str | None,
) -> None:  # fmt: skip
    """Students by recipe: zero-shot top-1 on each set and on changed images, by images seen and by seconds."""
    sets = _all_sets(Path(data), Path(out))
    if one:
        keep_freed_memory()  # as train-student does
        student, name, seen, seed = one.split(":")
        _run(Path(stores), Path(out), sets, student, name, int(seen), int(seed), precision)
        return
    names = only or tuple(RECIPES)
    if not report:
        where = ["--stores", stores, "--data", data, "--out", out, "--precision", precision]
        words = [sys.executable, "-m", "benchmarks", "recipes", *where, "--one"]
        with ThreadPoolExecutor(jobs) as pool:
            wanted = product(students, names, sorted(budgets), range(seeds))
            asked = [pool.submit(subprocess.run, [*words, ":".join(map(str, key))], check=True) for key in wanted]
            for done in asked:
                done.result()
    teacher = _scores(Path(out), _teacher(Path(stores), Path(out), sets), sets)
    points: dict[str, dict[int, list[Outcome]]] = {}
    for student, seen in product(students, sorted(budgets)):
        found = {}
        for name in names:
            kept = (_outcome(Path(out), sets, student, name, seen, seed) for seed in range(seeds))
            if runs := [run for run in kept if run]:
                found[name] = points.setdefault(f"{student}: {name}", {})[seen] = runs
        click.echo(f"\n{student}, {seen:,} images seen\n\n{_table(found, teacher)}")
    how = (
        f"precision {precision}, one torch thread; seeds 0 to {seeds - 1}; the half of the images that did not choose;"
    )
    how += f" {', '.join(CHANGES)}: in percent of what the teacher scores on images changed so"
    click.echo(f"\n{machine()}, {describe('cpu')}, {how}")
    if not points:
        raise click.ClickException(f"no finished run in {out}: repeat the command without --report")
    if plot:
        write_plot(plot, points, teacher["mean"])


def _all_sets(data: Path, out: Path) -> dict[str, Path]:
    """Every set by its name, their changed copies by NAME-CHANGE, and the pairs."""
    plain = {name: data / name for name in SETS}
    changed = {
        f"{name}-{change}": changed_set(folder, change, out / "changed")
        for name, folder in plain.items()
        for change in CHANGES
    }
    return plain | changed | {PAIRS: data / PAIRS}


def _folder(student: str, name: str, seen: int, seed: int) -> str:
    return f"{student}-{name.replace(', ', '-').replace(' ', '-')}-{seen}-{seed}"


def _run(
    stores: Path, out: Path, sets: dict[str, Path], student: str, name: str, seen: int, seed: int, precision: str
) -> None:
    """Train, if that is not done, and evaluate on every set."""
    store, losses, changes = RECIPES[name]
    run = str(out / _folder(student, name, seen, seed))
    fields = {"optimizer": "adamw", **STUDENTS[student], **changes}
    if schedule := fields.pop("schedule", None):
        train_module.learning_rate = partial(_scheduled, SCHEDULES[schedule])
    if fields.get("texts_per_step") == 0:
        fields["texts_per_step"] = fields["batch_size"]
    steps = seen // fields["batch_size"]
    loss = LossConfig(**{**dict.fromkeys(LossConfig.WEIGHTS, 0.0), **losses})
    first, *more = (str(stores / f"{one}.zarr") for one in store.split("+"))
    rows = Store(first).schema.rows
    config = sample(
        first, str(stores / "texts.zarr"), run, more_images=tuple(more), loss=loss, epochs=10_000, max_steps=steps,
        warmup_epochs=seen / rows / 20, seed=seed, precision=precision, threads=1, workers=0, checkpoint_every=steps,
        log_every=50, **fields,
    )  # fmt: skip
    train_module.train(config)
    weights = "ema" if config.ema else "model"
    _evaluate(run, Path(run).name, out, sets, weights=weights)


def _scheduled(share: Callable[[float], float], step: int, **facts: Any) -> float:
    """As the trainer's learning_rate, with another fall after the same warm-up."""
    warmup_steps, steps = facts["warmup_steps"], facts["steps"]
    if step < warmup_steps:
        return learning_rate(step, **facts)
    fallen: float = share((step - warmup_steps) / max(1, steps - warmup_steps))
    return facts["floor"] + (facts["peak"] - facts["floor"]) * fallen


def _evaluate(model: str, name: str, out: Path, sets: dict[str, Path], **how: Any) -> str:
    fast: dict[str, Any] = {"decoder": "fast", "threads": 1, "skip_existing": True, "predictions": True}
    folders = tuple(str(folder) for folder in sets.values())
    evaluate(EvaluationConfig(model=model, folders=folders, out=str(out / "evaluations"), name=name, **fast, **how))
    return name


def _teacher(stores: Path, out: Path, sets: dict[str, Path]) -> str:
    return _evaluate(Store(str(stores / "whole.zarr")).schema.teacher.name, "teacher", out, sets)


def _scores(out: Path, name: str, sets: dict[str, Path]) -> dict[str, float]:
    """Top-1 by set, of the images that do not choose; the mean recall@5 of all pairs; and the mean of the sets over the
    images that do choose, as "chosen by"."""
    found, choosing = {}, []
    for title in sets.keys() - {PAIRS}:
        path = out / "evaluations" / name / "predictions" / f"{file_name(f'own-{title}', 'zero-shot')}.parquet"
        rows = pq.read_table(path, columns=["key", "correct"])
        chooses = np.array([hashlib.sha256(key.encode()).digest()[0] % 2 == 1 for key in rows["key"].to_pylist()])
        correct = rows["correct"].to_numpy(zero_copy_only=False)
        found[title] = float(correct[~chooses].mean())
        choosing += [float(correct[chooses].mean())] if title in SETS else []
    recalls = next(one.metrics for one in read_results(str(out / "evaluations" / name)) if one.set == PAIRS)
    found[PAIRS] = statistics.fmean(recalls[f"{way}_retrieval_recall@5"] for way in ("text", "image"))
    return {**found, "chosen by": statistics.fmean(choosing), "mean": statistics.fmean(found[one] for one in SETS)}


def _outcome(out: Path, sets: dict[str, Path], student: str, name: str, seen: int, seed: int) -> Outcome | None:
    """Scores of a run by set, and the seconds that its steps took; None where it is not there yet. Of several seeds the
    quickest counts: the others had neighbours."""
    folder = _folder(student, name, seen, seed)
    results = out / "evaluations" / folder / RESULTS_FILE
    if not results.exists() or len(read_results(str(results))) < len(sets):
        return None
    lines = [line for line in read_metrics(str(out / folder)) if line["event"] == "train"]
    rate = statistics.median(line["images_per_second"] for line in lines)
    return {**_scores(out, folder, sets), "seconds": seen / rate}


def _table(found: dict[str, list[Outcome]], teacher: dict[str, float]) -> str:
    head = ("recipe", "seeds", "chosen by", *SETS, "mean", f"{PAIRS} R@5", *CHANGES, "seconds")
    whole = {**teacher, "seconds": 0.0}
    rows = [_row("the teacher", [whole], teacher)]
    return table(head, rows + [_row(name, runs, teacher) for name, runs in found.items()])


def _row(name: str, runs: list[Outcome], teacher: dict[str, float]) -> tuple[str, ...]:
    cells = [_spread([run[one] for run in runs]) for one in ("chosen by", *SETS, "mean", PAIRS)]
    for change in CHANGES:
        titles = [f"{one}-{change}" for one in SETS]
        shares = [sum(run[title] for title in titles) / sum(teacher[title] for title in titles) for run in runs]
        cells.append(f"{statistics.fmean(shares):.0%}")
    return (name, str(len(runs)), *cells, f"{min(run['seconds'] for run in runs):,.0f}")


def _spread(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
