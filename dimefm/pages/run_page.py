"""Sections about training runs: what they are, and what they have logged, those of several runs over each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from cache_schemas.document import to_plain
from dimefm.inspection.info import examine
from dimefm.pages.charts import Line, line_chart
from dimefm.pages.page import Block, Cell, Facts, Section, Table, Words
from dimefm.pages.run_reading import LoggedRun, Points, broken, missing, read_logged
from dimefm.pages.short_words import short

_COLOURS = 8  # of templates/page.css
_COURSE = ("lr", "grad_norm", "images_per_second", "data_wait")
_WIDE = 10  # a loss that falls to less than its part in so many is drawn on a logarithmic axis
_TOWER = re.compile(r"(teacher(\d+)|text)_(.+)")


def run_sections(paths: Sequence[str]) -> list[Section]:
    """What is known of the runs at `paths`. Raises as read_logged does."""
    return sections_of(read_logged(paths))


def sections_of(runs: Sequence[LoggedRun]) -> list[Section]:
    """The same for runs that have been read."""
    facts = [[*_said(one, "It"), Facts(examine(one.path).rows)] for one in runs]
    if len(runs) == 1:
        first = [Section(f"{runs[0].name}: training run", facts[0])]
        last = [Section("Numbers", [_numbers(runs[0])])] if runs[0].lines else []
    else:
        first = [Section("Training runs", [_results(runs), *_differences(runs)])]
        last = [Section(f"{run.name}: training run", blocks) for run, blocks in zip(runs, facts, strict=True)]
    drawn = [
        ("Loss", [*_loss(runs), *_parts(runs)]),
        ("Validation during training", _validation(runs)),
        ("Learning rate, gradient and speed", _course(runs)),
    ]
    return [*first, *(Section(title, blocks) for title, blocks in drawn if blocks), *last]


def _said(logged: LoggedRun, subject: str) -> list[Block]:
    found = [(missing(logged), False), (broken(logged), True)]
    return [Words(f"{subject} {one}.", warning) for sentences, warning in found for one in sentences]


# -- charts -----------------------------------------------------------------------------------------------------------


def _loss(runs: Sequence[LoggedRun]) -> list[Block]:
    losses = [{name: words for name, words in _fields(run).items() if name.startswith("loss.")} for run in runs]
    alike = all(one == losses[0] for one in losses)
    note = "" if alike else "These runs minimise different losses: their values cannot be compared."
    return _over_steps(runs, "train", "loss", "Loss", "loss", note=note)


def _parts(runs: Sequence[LoggedRun]) -> list[Block]:
    """The parts of the loss: of one run those of a teacher or a tower in a chart, of several runs a chart for each."""
    names = [name for name in _all_names(runs, "train") if name not in ("loss", *_COURSE)]
    scales = [name for name in names if name.endswith("logit_scale")]
    parts = [name for name in names if name not in scales]
    if len(runs) > 1:
        whats = [*((name, "loss") for name in parts), *((name, "scale") for name in scales)]
        return [one for name, what in whats for one in _drawn(runs, "train", name, _in_words(name), what)]
    charts: list[Block] = []
    groups: dict[str, list[Line]] = {}
    for name in parts:
        whose, part = _whose(name)
        groups.setdefault(whose, []).append(Line(part, _finite(runs[0].points("train", name))))
    note = "Each part before its weight in the loss."
    for whose, lines in groups.items():
        title = f"Parts of the loss{f', {whose}' if whose else ''}"
        charts += _chart(title, lines, "step", "loss", note=note)
    for name in scales:
        charts += _drawn(runs, "train", name, _in_words(name), "scale")
    return charts


def _validation(runs: Sequence[LoggedRun]) -> list[Block]:
    names = _all_names(runs, "validation")
    if len(runs) == 1:
        lines = [Line(name, _finite(runs[0].points("validation", name))) for name in names]
        return _chart("Accuracy on labelled sets", lines, "step", "top-1") if lines else []
    return [one for name in names for one in _over_steps(runs, "validation", name, f"Accuracy on {name}", "top-1")]


def _course(runs: Sequence[LoggedRun]) -> list[Block]:
    return [
        *_drawn(runs, "train", "lr", "Learning rate", "learning rate", zero=True),
        *_drawn(runs, "train", "grad_norm", "Norm of the gradient", "norm"),
        *_drawn(runs, "train", "images_per_second", "Images per second", "images/s", zero=True),
        *_drawn(runs, "train", "data_wait", "Share of the time spent waiting for data", "share", zero=True),
    ]


def _over_steps(
    runs: Sequence[LoggedRun], event: str, name: str, title: str, along: str, *, note: str = ""
) -> list[Block]:
    """A value over steps, and where batches are unlike over the images that were seen too."""
    charts = _drawn(runs, event, name, title, along, note=note)
    if charts and _unlike_batches(runs):
        charts += _drawn(runs, event, name, f"{title}, over images seen", along, over="images", note=note)
    return charts


def _drawn(
    runs: Sequence[LoggedRun], event: str, name: str, title: str, along: str, *,
    over: Literal["steps", "images"] = "steps", zero: bool = False, note: str = "",
) -> list[Block]:  # fmt: skip
    """A chart of a value of all runs that have it; each has the same colour in all charts."""
    lines = []
    for colour, run in enumerate(runs):
        factor = run.batch_size if over == "images" else 1
        points = [(step * factor, value) for step, value in _finite(run.points(event, name))]
        lines.append(Line(run.name if len(runs) > 1 else along, points, colour))
    return _chart(title, lines, "images seen" if over == "images" else "step", along, zero=zero, note=note)


def _chart(
    title: str, lines: Sequence[Line], across: str, along: str, *, zero: bool = False, note: str = ""
) -> list[Block]:
    """The lines that have points; no chart where none has."""
    kept = [line for line in lines if line.points]
    values = [value for line in kept for _, value in line.points]
    if not values:
        return []
    log = not zero and min(values) > 0 and max(values) > _WIDE * min(values)
    chart = line_chart(title, kept, across, along, log=log, zero=zero, note=note)
    return [replace(chart, legend=()) if [line.name for line in kept] == [along] else chart]


# -- tables -----------------------------------------------------------------------------------------------------------


def _numbers(run: LoggedRun) -> Table:
    """Each value of one run: its last, and its best where one can be."""
    rows: list[list[str | Cell]] = []
    for event in ("train", "validation"):
        for name in run.names(event):
            if not (points := _finite(run.points(event, name))):
                continue
            best = _best(event, name)
            at = best(points, key=lambda point: point[1]) if best else None
            words = f"{_in_words(name)}{', top-1' if event == 'validation' else ''}"
            rows.append([words, *_value_cells(points[-1]), *(_value_cells(at) if at else (Cell(""), Cell("")))])
    return Table(("value", "last", "at step", "best", "at step"), rows, "lrrrr", "The last and the best of each value")


def _results(runs: Sequence[LoggedRun]) -> Table:
    """A row for each run: how far it is, and its last and best numbers."""
    sets, unlike = _all_names(runs, "validation"), _unlike_batches(runs)
    rows: list[list[str | Cell]] = []
    bests = {name: [_best_point(run, "validation", name) for run in runs] for name in sets}
    for number, run in enumerate(runs):
        losses, speeds = (_finite(run.points("train", name)) for name in ("loss", "images_per_second"))
        seen = run.done * run.batch_size
        row: list[str | Cell] = [
            run.name,
            Cell(f"{run.done:,} of {run.run.steps:,}", run.done),
            *([Cell(f"{seen:,}", seen)] if unlike else []),
            _value_cells(losses[-1] if losses else None)[0],
            _with_step(_best_point(run, "train", "loss")),
        ]
        for name in sets:
            points = _finite(run.points("validation", name))
            top = max((point[1] for point in bests[name] if point), default=math.nan)
            best = bests[name][number]
            row.append(_value_cells(points[-1] if points else None)[0])
            row.append(_with_step(best, good=best is not None and best[1] == top))
        middle = sorted(value for _, value in speeds)[len(speeds) // 2] if speeds else None
        row.append(Cell(f"{middle:,.0f}", middle) if middle is not None else Cell("none"))
        rows.append(row)
    of_sets = [words for name in sets for words in (f"{name} last", f"{name} best")]
    head = ("run", "steps", *(["images seen"] if unlike else []), "loss last", "loss lowest", *of_sets, "images/s")
    return Table(head, rows, "l" + "r" * (len(head) - 1), "How far each run is, and what it reached (at a step)")


def _differences(runs: Sequence[LoggedRun]) -> list[Block]:
    """The fields of the config that differ between runs."""
    said: list[Block] = [Words(f"{run.name} {one}.", warning=True) for run in runs for one in broken(run)]
    if len(runs) > _COLOURS:
        said.append(Words(f"There are {_COLOURS} colours, which come again after as many runs."))
    fields = [_fields(run) for run in runs]
    names = dict.fromkeys(name for one in fields for name in one)
    rows = [
        [name, *(one.get(name, "not recorded") for one in fields)]
        for name in names
        if len({one.get(name) for one in fields}) > 1
    ]
    if not rows:
        return [*said, Words("The configs of these runs are the same.")]
    head = ("field", *(run.name for run in runs))
    return [*said, Table(head, rows, "l" * len(head), "What differs between their configs")]


def _fields(run: LoggedRun) -> dict[str, str]:
    """All that a run was started with, by the name of a field and of a part within it, such as loss.vl."""
    more = {
        "teacher": ", ".join(f"{one.name} {one.weights[:12]}" for one in run.run.teachers),
        "machine": run.run.machine,
        "processes": run.run.processes,
        "images (contents)": (run.run.images_data or "")[:12] or None,
        "texts (contents)": (run.run.texts_data or "")[:12] or None,
    }
    return dict(_flat({name: to_plain(value) for name, value in run.config.items() if name != "out"} | more))


def _flat(values: dict[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list):
            yield f"{before}{name}", short(", ".join(map(str, value))) or "none"
        else:
            yield f"{before}{name}", "none" if value is None else short(str(value))


# -- values -----------------------------------------------------------------------------------------------------------


def _all_names(runs: Sequence[LoggedRun], event: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.names(event)))


def _unlike_batches(runs: Sequence[LoggedRun]) -> bool:
    """Whether a step has not as many images in each run."""
    return len({run.batch_size for run in runs}) > 1


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _best(event: str, name: str) -> Callable[..., tuple[float, float]] | None:
    """Which of the values of a name is the best, where one is."""
    if event == "validation" or name == "images_per_second":
        return max
    return None if name in _COURSE or name.endswith("logit_scale") else min


def _best_point(run: LoggedRun, event: str, name: str) -> tuple[float, float] | None:
    points, best = _finite(run.points(event, name)), _best(event, name)
    return best(points, key=lambda point: point[1]) if points and best else None


def _value_cells(point: tuple[float, float] | None) -> tuple[Cell, Cell]:
    """A value and its step."""
    if point is None:
        return Cell("none"), Cell("")
    step, value = point
    return Cell(f"{value:,.4g}", value), Cell(f"{step:,.0f}", step)


def _with_step(point: tuple[float, float] | None, *, good: bool = False) -> Cell:
    if point is None:
        return Cell("none")
    return Cell(f"{point[1]:,.4g} ({point[0]:,.0f})", point[1], mark="good" if good else "")


def _whose(name: str) -> tuple[str, str]:
    """Whose part of the loss a name is, "" for the image tower of a single teacher; and the part."""
    found = _TOWER.fullmatch(name)
    if not found:
        return "", name
    return (f"teacher {found[2]}" if found[2] else "text tower"), found[3]


def _in_words(name: str) -> str:
    words = {"lr": "learning rate", "grad_norm": "norm of the gradient", "images_per_second": "images per second",
             "data_wait": "share of the time spent waiting for data"}  # fmt: skip
    whose, part = _whose(name)
    return f"{whose}: {part}" if whose else words.get(name, name)
