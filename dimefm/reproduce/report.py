"""The report at the end of `make reproduce`: how good the students are, what they cost, and plots of their runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimefm.evaluation.predictions import read_predictions
from dimefm.evaluation.results import read_results
from dimefm.evaluation.speed import Points
from dimefm.latency.plot import COLOURS, draw
from dimefm.reproduce.speed import read_speeds, speed_points, speed_table
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system import storage
from dimefm.system.inert_text import markdown
from dimefm.system.machine import cpus, describe
from dimefm.system.markdown_table import markdown_table
from dimefm.system.versions import versions
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import read_run

EVALUATIONS = "evaluations"
REPORT_FILE, PLOT_FILE = "report.md", "report.png"
_TEACHER_COLOUR = "#9db4c8"
_LINE_STYLES = ("-", "--", ":")  # of the sets


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student that a job trains: its name in paths, its label in tables, and its recipe with further options of
    train-student. `grounded` draws its texts from the selection. `bars` is the top-1 that it must reach on a set, as a
    multiple of chance."""

    name: str
    label: str
    recipe: str
    grounded: bool = False
    options: tuple[str, ...] = ()
    bars: dict[str, float] = field(default_factory=dict)

    def run(self, out: Path) -> Path:
        """Its run folder, in the folder of the job."""
        return out / f"run-{self.name}"


@dataclass(frozen=True)
class _SetScore:
    """Zero-shot of a model on a set, with the prediction for every image."""

    weights: str
    images: int
    classes: int
    top1: float
    top5: float
    predictions: list[int]

    @property
    def times_chance(self) -> float:
        return self.top1 * self.classes


@dataclass(frozen=True)
class JobReport:
    """The text of report.md, and the bars that were missed."""

    text: str
    missed: list[str]


def write_report(out: Path, students: Sequence[Student]) -> JobReport:
    """Read what the stages left in `out`, and write report.md and report.png there."""
    teacher, found = _scores(out, "teacher"), {student.name: _scores(out, student.name) for student in students}
    missed = [
        f"{student.label}: {name} {found[student.name][name].times_chance:.1f}x chance (bar {bar})"
        for student in students
        for name, bar in student.bars.items()
        if found[student.name][name].times_chance < bar
    ]
    seconds: dict[str, float | None] = json.loads((out / "stages.json").read_text())
    models = {"teacher": teacher, **{student.label: found[student.name] for student in students}}
    speeds = read_speeds(out, {name: {one.weights for one in scores.values()} for name, scores in models.items()})
    tables = [
        _accuracy_table(teacher, found, students),
        speed_table(speeds),
        _cost_table(out, students, seconds),
        _stage_table(out, students, seconds),
    ]
    text = "\n".join([*(line for table in tables for line in [*table, ""]), _machine(out, students)])
    storage.write_atomic(str(out / REPORT_FILE), f"# dimefm: {out.name}\n\n{text}\n".encode())
    accuracy = {name: fmean(one.top1 for one in scores.values()) for name, scores in models.items()}
    _plot(out, teacher, found, students, speed_points(speeds, accuracy))
    return JobReport(f"{text}\n\nwritten: {out / REPORT_FILE}, {out / PLOT_FILE}", missed)


def _scores(out: Path, model: str) -> dict[str, _SetScore]:
    """The zero-shot scores of a model, by set. A user may have measured more in its folder."""
    folder = str(out / EVALUATIONS / model)
    return {
        result.set: _SetScore(
            weights=str(result.model["weights"]),
            images=result.images,
            classes=result.classes,
            top1=result.metrics["top1"],
            top5=result.metrics.get("top5", 1.0),
            predictions=read_predictions(folder, result),
        )
        for result in read_results(folder)
        if result.protocol == "zero-shot" and "top1" in result.metrics
    }


def _accuracy_table(
    teacher: dict[str, _SetScore], found: dict[str, dict[str, _SetScore]], students: Sequence[Student]
) -> list[str]:
    """A row for the teacher and each student on each set."""
    rows = []
    for name, t in teacher.items():
        shown = markdown(name)
        where = f"{shown} ({t.images:,} images, {t.classes} classes)"
        rows.append((where, "teacher", f"{t.top1:.1%} / {t.top5:.1%}", "", f"{t.times_chance:.1f}", ""))
        for student in students:
            s = found[student.name][name]
            agree = sum(a == b != -1 for a, b in zip(t.predictions, s.predictions, strict=True)) / s.images
            bar = f" (bar {student.bars[name]})" if name in student.bars else ""
            rows.append(
                (
                    shown,
                    student.label,
                    f"{s.top1:.1%} / {s.top5:.1%}",
                    f"{s.top1 / max(t.top1, 1e-9):.0%}",
                    f"{s.times_chance:.1f}{bar}",
                    f"{agree:.1%}",
                )
            )
    head = ("zero-shot", "model", "top-1 / top-5", "of teacher", "x chance", "as teacher says")
    return markdown_table([head, *rows], padded=True)


def _cost_table(out: Path, students: Sequence[Student], seconds: dict[str, float | None]) -> list[str]:
    """The cost of the teacher, once, and of each student after it; and what each would cost with the teacher in its
    training loop."""
    images, texts = Store(str(out / "images.zarr")), Store(str(out / "texts.zarr"))
    image_rate, text_rate = _rate(images), _rate(texts)
    once = _total([seconds.get(name) for name in ("cache-images", "cache-texts")])
    rows = [("teacher, once", _seconds(once), "", "")]
    online_of_all, cached_of_all = list[float | None](), [once]
    for student in students:
        config = read_run(str(student.run(out))).config
        steps = _steps(out, student)
        seen, drawn = steps * int(str(config["batch_size"])), 0
        if config["loss"]["vl"]:  # type: ignore[index]
            drawn = steps * int(str(config["texts_per_step"]))
        spent = seconds.get(f"train {student.name}")
        online = None if spent is None else spent + seen / image_rate + drawn / text_rate
        online_of_all.append(online)
        cached_of_all.append(spent)
        times = f"{online / spent:,.0f} times" if spent and online else ""
        rows.append((f"student: {student.label}", _seconds(spent), _seconds(online), times))
    whole, without = _total(cached_of_all), _total(online_of_all)
    saving = f"{without / whole:.1f} times" if whole and without else ""
    rows.append((f"all {len(students) + 1} together", _seconds(whole), _seconds(without), saving))
    return [
        *markdown_table([("seconds of", "with the cache", "teacher in the loop", "saving"), *rows], padded=True),
        "",
        f"In the loop the teacher would encode every image and sentence of each step again, at the {image_rate:,.0f} "
        f"images/s and {text_rate:,.0f} sentences/s that it had in stage 1 on all cores.",
    ]


def _total(seconds: Sequence[float | None]) -> float | None:
    """The sum; None if one is not known, as for a stage that was stopped and went on."""
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None


def _seconds(spent: float | None) -> str:
    return "resumed" if spent is None else f"{spent:,.0f}"


def _rate(store: Store) -> float:
    """Rows per second of the teacher on this machine. The time of a shard is that of one worker; on a CPU there was one
    worker per core."""
    commits = list(store.commits())
    workers = cpus() if commits[0].device == "cpu" else 1
    return store.schema.rows / sum(commit.seconds for commit in commits) * workers


def _steps(out: Path, student: Student) -> int:
    return int(max(line["step"] for line in read_metrics(str(student.run(out))) if line["event"] == "train"))


def _stage_table(out: Path, students: Sequence[Student], seconds: dict[str, float | None]) -> list[str]:
    images, texts, prompts = (Store(str(out / n)) for n in ("images.zarr", "texts.zarr", "prompts.zarr"))
    evaluated = sum(score.images for score in _scores(out, "teacher").values())
    counts: dict[str, tuple[int, str, float | None]] = {
        "cache-images": (images.schema.rows, "images", _bytes(out / "images.zarr") / images.schema.rows),
        "cache-texts": (texts.schema.rows, "texts", _bytes(out / "texts.zarr") / texts.schema.rows),
        "cache-prompts": (prompts.schema.rows, "prompts", _bytes(out / "prompts.zarr") / prompts.schema.rows),
        "build-index": (texts.schema.rows, "texts", _bytes(out / "texts.index") / texts.schema.rows),
        "retrieve": (images.schema.rows, "images", _bytes(out / "pairs.zarr") / images.schema.rows),
        "select-texts": (texts.schema.rows, "texts", None),
        "evaluate teacher": (evaluated, "images", None),
    }
    for student in students:
        batch = int(str(read_run(str(student.run(out))).config["batch_size"]))
        counts[f"train {student.name}"] = (_steps(out, student) * batch, "images seen", None)
        counts[f"evaluate {student.name}"] = (evaluated, "images", None)
    rows = []
    for name, spent in seconds.items():
        count, unit, size = counts.get(name, (None, "", None))
        rows.append(
            (
                name,
                f"{spent:,.1f}" if spent else "resumed",
                f"{count:,} {unit}" if count else "",
                f"{count / spent:,.0f}/s" if count and spent else "",
                f"{size:,.0f}" if size else "",
            )
        )
    total = sum(spent or 0 for spent in seconds.values())
    hits = Pairs(str(out / "pairs.zarr")).hit_counts()
    return [
        *markdown_table([("stage", "seconds", "rows", "rate", "bytes/row on disk"), *rows], padded=True),
        "",
        f"all stages: {total / 60:.1f} minutes, with the start of each (but not the import of its libraries)",
        f"visually grounded: {hits.selected:,} of {hits.text_rows:,} sentences, by at least one image",
    ]


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _machine(out: Path, students: Sequence[Student]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    config = read_run(str(students[0].run(out))).config
    threads = f"{config['threads']} torch thread{'s' if config['threads'] != 1 else ''}"
    how = f"students in {config['precision']} on {threads}, seed {config['seed']}"
    return f"machine: {describe('cpu')}, {cpus()} cores, {platform.system()}; {how}; {packages}"


def _plot(
    out: Path,
    teacher: dict[str, _SetScore],
    found: dict[str, dict[str, _SetScore]],
    students: Sequence[Student],
    points: Points,
) -> None:
    """Write report.png: the loss and the validation of each run, the final accuracy of all models, and their speed."""
    figure = Figure(figsize=(11.5, 7.6), layout="constrained")
    (left, middle), (right, last) = figure.subplots(2, 2)
    for student, colour in zip(students, COLOURS, strict=False):
        _plot_run(left, middle, student, read_metrics(str(student.run(out))), list(teacher), colour)
    for name, style in zip(teacher, _LINE_STYLES, strict=False):
        middle.axhline(100 * teacher[name].top1, ls=style, color="#888888", lw=1, label=f"{name}, teacher")
    left.set(title="Training loss", xlabel="share of the run", ylabel="loss / first loss", ylim=(0, None))
    left.legend(fontsize=8)
    middle.set(title="Zero-shot top-1 while training", xlabel="share of the run", ylabel="%", ylim=(0, None))
    middle.legend(fontsize=7)
    models = [("teacher", teacher, _TEACHER_COLOUR)]
    models += [(s.label, found[s.name], colour) for s, colour in zip(students, COLOURS, strict=False)]
    _plot_accuracy(right, teacher, models)
    draw(last, points, (_TEACHER_COLOUR, *COLOURS))
    with storage.writing_to(str(out)), storage.writing_atomically(str(out / PLOT_FILE)) as file:
        figure.savefig(file, dpi=130, format="png")


def _plot_run(
    left: Axes, middle: Axes, student: Student, lines: list[dict[str, Any]], sets: list[str], colour: str
) -> None:
    """Draw the loss of one run into `left`, and its validation on each set into `middle`."""
    train = [line for line in lines if line["event"] == "train"]
    validation = [line for line in lines if line["event"] == "validation"]
    steps = train[-1]["step"]
    first = next((line["loss"] for line in train if line["loss"]), 1.0)
    places = [line["step"] / steps for line in train]
    left.plot(places, [line["loss"] / first for line in train], color=colour, label=student.label)
    for name, style in zip(sets, _LINE_STYLES, strict=False):
        points = [(line["step"] / steps, 100 * line[name]) for line in validation]
        middle.plot(*zip(*points, strict=True), style, marker=".", color=colour, label=f"{name}, {student.label}")


def _plot_accuracy(
    right: Axes, teacher: dict[str, _SetScore], models: list[tuple[str, dict[str, _SetScore], str]]
) -> None:
    """Draw a group of bars for each set, with one bar per model, and a line at chance."""
    width = 0.8 / len(models)
    for number, (label, scores, colour) in enumerate(models):
        places = [place - 0.4 + width * (number + 0.5) for place in range(len(teacher))]
        heights = [100 * scores[name].top1 for name in teacher]
        bars = right.bar(places, heights, width * 0.95, label=label, color=colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    for place, name in enumerate(teacher):
        chance = 100 / teacher[name].classes
        right.hlines(chance, place - 0.4, place + 0.4, color="#b03a2e", lw=1.2, label="" if place else "chance")
    right.set(title="Zero-shot top-1, final", ylabel="%", xticks=list(range(len(teacher))), xticklabels=list(teacher))
    right.set_ylim(0, right.get_ylim()[1] * 1.25)  # room for the legend
    right.legend(fontsize=8, ncols=2, loc="upper right")
