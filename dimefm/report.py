"""The end of `make reproduce`: one table in Markdown, and plots of the run."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dimefm.commits import versions
from dimefm.evaluation.predictions import read_predictions
from dimefm.evaluation.results import read_results
from dimefm.machine import cpus
from dimefm.pairs import Pairs
from dimefm.runlog import read_metrics
from dimefm.store import Store

EVALUATIONS = "evaluations"
REPORT_FILE, PLOT_FILE = "report.md", "report.png"


@dataclass(frozen=True)
class Report:
    """The text, as written to report.md, and the bars that were missed."""

    text: str
    missed: list[str]


def write_report(out: Path, bars: dict[str, float]) -> Report:
    """Read what the stages left in `out` and write report.md and report.png beside it."""
    teacher, student = _sets(out, "teacher"), _sets(out, "student")
    missed = [
        f"{name} {student[name]['top1'] * student[name]['classes']:.1f}x chance (bar {bar})"
        for name, bar in bars.items()
        if student[name]["top1"] * student[name]["classes"] < bar
    ]
    text = "\n".join([*_accuracy(teacher, student, bars), "", *_stages(out), "", *_machine()])
    (out / REPORT_FILE).write_text(f"# dimefm: {out.name}\n\n{text}\n", encoding="utf-8")
    _plot(out, teacher, student)
    return Report(f"{text}\n\nwritten: {out / REPORT_FILE}, {out / PLOT_FILE}", missed)


def _sets(out: Path, model: str) -> dict[str, dict[str, Any]]:
    """Of each set: images, classes, top1, top5 and the prediction of every image."""
    folder = out / EVALUATIONS / model
    return {
        result.set: {
            "images": result.images,
            "classes": result.classes,
            "top1": result.metrics["top1"],
            "top5": result.metrics.get("top5", 1.0),
            "predictions": read_predictions(str(folder), result),
        }
        for result in read_results(str(folder))
    }


def _accuracy(teacher: dict[str, Any], student: dict[str, Any], bars: dict[str, float]) -> list[str]:
    head = ("zero-shot", "teacher top-1/5", "student top-1/5", "student/teacher", "x chance", "agreement")
    rows = []
    for name, s in student.items():
        t = teacher[name]
        agree = sum(a == b for a, b in zip(t["predictions"], s["predictions"], strict=True)) / s["images"]
        bar = f" (bar {bars[name]})" if name in bars else ""
        rows.append(
            (
                f"{name} ({s['images']:,} images, {s['classes']} classes)",
                f"{t['top1']:.1%} / {t['top5']:.1%}",
                f"{s['top1']:.1%} / {s['top5']:.1%}",
                f"{s['top1'] / max(t['top1'], 1e-9):.0%}",
                f"{s['top1'] * s['classes']:.1f}{bar}",
                f"{agree:.1%}",
            )
        )
    return _table(head, rows)


def _stages(out: Path) -> list[str]:
    seconds = json.loads((out / "stages.json").read_text())
    images, texts, prompts = (Store(str(out / n)) for n in ("images.zarr", "texts.zarr", "prompts.zarr"))
    train = [line for line in read_metrics(str(out / "run")) if line["event"] == "train"]
    batch = json.loads((out / "run" / "run.json").read_text())["config"]["batch_size"]
    evaluated = sum(s["images"] for s in _sets(out, "student").values())
    counts = {
        "cache-images": (images.schema.rows, "images", _bytes(out / "images.zarr") / images.schema.rows),
        "cache-texts": (texts.schema.rows, "texts", _bytes(out / "texts.zarr") / texts.schema.rows),
        "cache-prompts": (prompts.schema.rows, "prompts", _bytes(out / "prompts.zarr") / prompts.schema.rows),
        "build-index": (texts.schema.rows, "texts", _bytes(out / "texts.index") / texts.schema.rows),
        "retrieve": (images.schema.rows, "images", _bytes(out / "pairs.zarr") / images.schema.rows),
        "select-texts": (texts.schema.rows, "texts", None),
        "train-student": (train[-1]["step"] * batch, "images seen", None),
        "evaluate student": (evaluated, "images", None),
        "evaluate teacher": (evaluated, "images", None),
    }
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
    selection = Pairs(str(out / "pairs.zarr")).selection()
    return [
        *_table(("stage", "seconds", "rows", "rate", "bytes/row on disk"), rows),
        "",
        f"all stages: {total / 60:.1f} minutes, start-up of each command included",
        f"visually grounded: {selection.selected:,} of {selection.text_rows:,} sentences, by an image or more",
    ]


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _machine() -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [f"machine: {platform.machine()}, {cpus()} cores, {platform.system()}; seed 0; {packages}"]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]]]


def _plot(out: Path, teacher: dict[str, Any], student: dict[str, Any]) -> None:
    lines = read_metrics(str(out / "run"))
    train = [line for line in lines if line["event"] == "train"]
    validation = [line for line in lines if line["event"] == "validation"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([line["step"] for line in train], [line["loss"] for line in train], color="#1f4e79")
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    for name in student:
        points = [(line["step"], 100 * line[name]) for line in validation]
        (drawn,) = middle.plot(*zip(*points, strict=True), marker=".", label=f"{name}, student")
        middle.axhline(100 * teacher[name]["top1"], ls="--", color=drawn.get_color(), lw=1, label=f"{name}, teacher")
    middle.set(title="Zero-shot top-1 while training", xlabel="step", ylabel="%", ylim=(0, None))
    middle.legend(fontsize=8)
    places = range(len(student))
    for shift, kind, sets, colour in ((-0.2, "teacher", teacher, "#9db4c8"), (0.2, "student", student, "#1f4e79")):
        values = [100 * sets[name]["top1"] for name in student]
        bars = right.bar([p + shift for p in places], values, 0.38, label=kind, color=colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    for place, name in zip(places, student, strict=True):
        chance = 100 / student[name]["classes"]
        label = "chance" if place == 0 else None
        right.hlines(chance, place - 0.4, place + 0.4, color="#b03a2e", lw=1.2, label=label)
    right.set(title="Zero-shot top-1, final", ylabel="%", xticks=list(places), xticklabels=list(student))
    right.legend(fontsize=8)
    figure.savefig(out / PLOT_FILE, dpi=130)
