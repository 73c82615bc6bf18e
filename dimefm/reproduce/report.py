"""The report at the end of `make reproduce`: its tables in Markdown, plots of its runs, and a page of all it made."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimefm.evaluation.speed import Points
from dimefm.latency.plot import COLOURS, draw
from dimefm.pages.page import Block, Section, Table, Words, render
from dimefm.pages.report import make_page
from dimefm.reproduce.speed import read_speeds, speed_points, speed_table
from dimefm.reproduce.tables import (
    JobTable,
    SetScore,
    Student,
    accuracy_table,
    cost_table,
    read_scores,
    stage_table,
)
from dimefm.system import storage
from dimefm.system.inert_text import markdown
from dimefm.system.machine import cpus, describe
from dimefm.system.markdown_table import markdown_table
from dimefm.system.versions import versions
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import read_run

REPORT_FILE, PLOT_FILE, PAGE_FILE = "report.md", "report.png", "report.html"
_TEACHER_COLOUR = "#9db4c8"
_LINE_STYLES = ("-", "--", ":")  # of the sets


@dataclass(frozen=True)
class JobReport:
    """The text of report.md, and the bars that were missed."""

    text: str
    missed: list[str]


def write_report(out: Path, students: Sequence[Student]) -> JobReport:
    """Read what the stages left in `out`, and write report.md, report.png and report.html there."""
    teacher, found = read_scores(out, "teacher"), {student.name: read_scores(out, student.name) for student in students}
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
        accuracy_table(teacher, found, students),
        speed_table(speeds),
        cost_table(out, students, seconds),
        stage_table(out, students, seconds),
    ]
    machine = _machine(out, students)
    text = "\n".join([*(line for table in tables for line in [*_in_markdown(table), ""]), machine])
    storage.write_atomic(str(out / REPORT_FILE), f"# dimefm: {out.name}\n\n{text}\n".encode())
    accuracy = {name: fmean(one.top1 for one in scores.values()) for name, scores in models.items()}
    _plot(out, teacher, found, students, speed_points(speeds, accuracy))
    _write_page(out, tables, machine)
    written = ", ".join(str(out / name) for name in (REPORT_FILE, PLOT_FILE, PAGE_FILE))
    return JobReport(f"{text}\n\nwritten: {written}", missed)


def _in_markdown(table: JobTable) -> list[str]:
    """The lines of a table, and below it those of its notes."""
    rows = [tuple(map(markdown, row)) for row in table.rows]
    align = "" if table.title != "Speed" else "l" + "r" * (len(rows[0]) - 1)
    lines = markdown_table(rows, align, padded=True)
    return [*lines, "", *table.notes] if table.notes else lines


def _write_page(out: Path, tables: Sequence[JobTable], machine: str) -> None:
    """Write report.html: these tables, and below them all that `dimefm report` shows of the folder."""
    blocks: list[Block] = []
    for table in tables:
        head, *rows = table.rows
        blocks.append(Table(head, rows, "l" + "r" * (len(head) - 1) if table.title == "Speed" else "", table.title))
        blocks += [Words(note) for note in table.notes]
    first = Section("The job", [*blocks, Words(machine)])
    page = make_page([str(out)])
    page = replace(page, sections=[first, *page.sections])
    storage.write_atomic(str(out / PAGE_FILE), render(page).encode())


def _machine(out: Path, students: Sequence[Student]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    config = read_run(str(students[0].run(out))).config
    threads = f"{config['threads']} torch thread{'s' if config['threads'] != 1 else ''}"
    how = f"students in {config['precision']} on {threads}, seed {config['seed']}"
    return f"machine: {describe('cpu')}, {cpus()} cores, {platform.system()}; {how}; {packages}"


def _plot(
    out: Path,
    teacher: dict[str, SetScore],
    found: dict[str, dict[str, SetScore]],
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
    right: Axes, teacher: dict[str, SetScore], models: list[tuple[str, dict[str, SetScore], str]]
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
