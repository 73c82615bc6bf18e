"""Sections about results of evaluations: models side by side, and what is right and wrong on each set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cache_schemas.evaluation import EvaluationResult
from dimefm.evaluation.compare import Cell as Number
from dimefm.evaluation.compare import Comparison, Line
from dimefm.pages import charts
from dimefm.pages.cells import Row, count, measure, percent
from dimefm.pages.evaluated import Model, comparison, open_models
from dimefm.pages.page import Block, Cell, Chart, Section, Table, Words
from dimefm.pages.prediction_sections import FEW_SHOT, prediction_sections, without_predictions
from dimefm.system.wording import counted

_MOST_CURVES = 12


def evaluation_sections(paths: Sequence[str]) -> list[Section]:
    """The results of all models, then a section for each set and protocol of which predictions were kept."""
    found = open_models(paths)
    empty = [Words(f"{one.name} has no result yet", warning=True) for one in found if not one.results]
    models = [one for one in found if one.results]
    if not models:
        return [Section("Results of evaluations", empty)]
    table = comparison(models)
    blocks: list[Block] = [*empty, *(Words(note) for note in table.notes), _models(models), *_bars(table)]
    blocks += [*_curves(table), _results(models, table), *without_predictions(models)]
    title = f"Results of {counted(len(models), 'model')}"
    return [Section(title, blocks), *prediction_sections(models)]


def _models(models: Sequence[Model]) -> Table:
    head = ("model", "measured as", "parameters", "image tower", "embedding", "precision", "results", "last on")
    rows: list[Row] = []
    for one in models:
        facts = {name: value for result in one.results for name, value in result.model.items()}
        numbers = [facts.get(name) for name in ("parameters", "image_parameters", "embed_dim")]
        shown = [count(n) if isinstance(n, int) else measure(None, "") for n in numbers]
        last = max(result.finished for result in one.results)
        rows.append([
            one.name, str(facts.get("name", "")), *shown, str(facts.get("precision", "")),
            count(len(one.results)), last[:16].replace("T", " "),
        ])  # fmt: skip
    return Table(head, rows, "llrrrlrr", "Models")


def _cell(table: Comparison, model: int, line: Line) -> Number | None:
    found = table.models[model].cells.get(line)
    return found if isinstance(found, Number) else None


def _bars(table: Comparison) -> Iterator[Chart]:
    """A chart for each protocol; few-shot with several numbers of shots has curves in their place."""
    lines, curves = table.names(), _shots(table)
    for protocol in dict.fromkeys(line.protocol for line in lines):
        match = FEW_SHOT.match(protocol)
        those = [
            line for line in lines
            if line.protocol == protocol and not (match and len(curves[line.title, match["rule"]]) > 1)
        ]  # fmt: skip
        if not those:
            continue
        series = []
        for number, column in enumerate(table.models):
            cells = [_cell(table, number, line) for line in those]
            series.append((column.name, [_bar(cell) if cell else None for cell in cells]))
        groups = [f"mean of {line.title}" if line.kind == "mean" else line.title for line in those]
        yield charts.bar_chart(protocol, groups, series, "%", note="Whiskers are intervals of 95 %.")


def _bar(cell: Number) -> charts.Bar:
    interval = (100 * cell.interval[0], 100 * cell.interval[1]) if cell.interval else None
    return charts.Bar(100 * cell.value, f"{100 * cell.value:.1f}{'*' if cell.partial else ''}", interval)


def _shots(table: Comparison) -> dict[tuple[str, str], dict[int, Line]]:
    """The lines of few-shot by set and rule, and then by the number of shots."""
    found: dict[tuple[str, str], dict[int, Line]] = {}
    for line in table.names():
        if match := FEW_SHOT.match(line.protocol):
            found.setdefault((line.title, match["rule"]), {})[int(match["shots"])] = line
    return found


def _curves(table: Comparison) -> Iterator[Block]:
    """Few-shot over the number of shots, a chart for each set."""
    found = {key: lines for key, lines in _shots(table).items() if len(lines) > 1}
    for (title, rule), shots in list(found.items())[:_MOST_CURVES]:
        drawn = []
        for number, column in enumerate(table.models):
            cells = {n: cell for n in sorted(shots) if (cell := _cell(table, number, shots[n]))}
            points = [(float(n), 100 * cell.value) for n, cell in cells.items()]
            spread = [100 * (cell.deviation or 0) for cell in cells.values()]
            drawn.append(charts.Line(column.name, points, number, spread))
        yield charts.line_chart(
            f"{title}: few-shot, {rule}", drawn, "images per class", "%", log_across=True,
            note="Means over seeds, and their standard deviation up and down.",
        )  # fmt: skip
    if len(found) > _MOST_CURVES:
        yield Words(f"Of {len(found)} sets with few-shot, the curves of {_MOST_CURVES} are drawn; the table has all.")


def _results(models: Sequence[Model], table: Comparison) -> Table:
    """A row for each model, set and protocol, and for each mean of a suite."""
    head = ("set", "protocol", "model", "metric", "%", "95 %", f"of {models[0].name}", "images", "also", "remarks")
    rows: list[Row] = []
    for line in table.names():
        for number, model in enumerate(models):
            if cell := _cell(table, number, line):
                results = [one for one in model.results if (one.title, _pooled(one.protocol)) == tuple(line)]
                whole = _cell(table, 0, line)
                share = cell.value / whole.value if whole and whole.value else None
                rows.append([
                    f"mean of {line.title}" if line.kind == "mean" else line.title, line.protocol, model.name,
                    results[0].metric if results else "",
                    Cell(str(cell), cell.value, share=cell.value),
                    f"{100 * cell.interval[0]:.1f} to {100 * cell.interval[1]:.1f}" if cell.interval else "",
                    measure(None, "") if share is None else percent(share),
                    count(results[0].images) if results else "",
                    _others(results), "; ".join(_remarks(results)),
                ])  # fmt: skip
    return Table(head, rows, "llllrrrrll", "Results")


def _pooled(protocol: str) -> str:
    """As compare.Line has it: without the seed, in short."""
    return re.sub(r"/seed-\d+$", "", protocol).replace("elevater, test-selected", "test-selected")


def _others(results: Sequence[EvaluationResult]) -> str:
    """The other metrics, as means over seeds."""
    names = [name for name in results[0].metrics if name != results[0].metric] if results else []
    names.sort(key=lambda name: (name.partition("@")[0], int(name.partition("@")[2] or 0)))
    means = {name: sum(one.metrics.get(name, 0.0) for one in results) / len(results) for name in names}
    return ", ".join(f"{name.replace('_retrieval_recall', ' R')} {100 * value:.1f}" for name, value in means.items())


def _remarks(results: Sequence[EvaluationResult]) -> list[str]:
    """What differs from the published set, and the notes, of all seeds."""
    partial = [f"not the whole set: {words}" for one in results for words in one.partial]
    notes = [note for one in results for note in one.notes]
    return list(dict.fromkeys([*partial, *notes]))
