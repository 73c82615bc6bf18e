"""`dimefm compare`: models side by side with the rows that the paper published, as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dimefm.errors import DimefmError, StoreError
from dimefm.evaluation.results import Pooled, pool, read_results
from dimefm.evaluation.suite_means import measured_suites
from dimefm.system import inert_text, storage
from dimefm.system.markdown_table import markdown_table

PUBLISHED = "published"


@dataclass(frozen=True)
class Column:
    """The column of a model: its name, where its numbers come from, and a text for each line that it has."""

    name: str
    source: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """A table with a column per model, and a line for ImageNet-1K, for each mean, and for each set and protocol."""

    models: list[Column]
    notes: list[str]

    def lines(self) -> list[list[str]]:
        """The cells below the head: ImageNet-1K and the means first."""
        found = list(dict.fromkeys(name for model in self.models for name in model.cells))
        first = [name for name in found if name.split(" ")[0] in ("imagenet1k", "elevater", "robustness")]
        names = [*first, *(name for name in found if name not in first)]
        return [[name, *(model.cells.get(name, "") for model in self.models)] for name in names]

    def head(self) -> list[list[str]]:
        """The names of the models, and below each where its numbers come from."""
        return [["", *(model.name for model in self.models)], ["source", *(model.source for model in self.models)]]

    def markdown(self) -> str:
        """For a README."""
        names, sources = self.head()
        rows = [[*map(inert_text.markdown, row)] for row in (names, sources, *self.lines())]
        notes = [inert_text.markdown(note).replace("*", "\\*") for note in self.notes]
        table = markdown_table(rows, align="l" + "r" * len(self.models))
        return "\n".join([*table, *(f"\n{note}" for note in notes), ""])

    def csv(self) -> str:
        """For a spreadsheet."""
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows(
            [*map(inert_text.csv_cell, line)] for line in (*self.head(), *self.lines())
        )
        return sink.getvalue()

    def latex(self) -> str:
        """A tabular for LaTeX, which needs the package booktabs."""
        head, body = (["".join(_latex_line(line)) for line in part] for part in (self.head(), self.lines()))
        begin = rf"\begin{{tabular}}{{l{'r' * len(self.models)}}}"
        lines = [begin, r"\toprule", *head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {inert_text.line(note)}" for note in self.notes), ""])


def compare(folders: Sequence[str], *, published: bool = True) -> Comparison:
    """The results in these folders (or results.jsonl files), one column for each. Raises StoreError for a folder
    without results, and if the models have no line in common."""
    models = [pool(read_results(folder)) for folder in folders]
    for folder, pooled in zip(folders, models, strict=True):
        if not pooled:
            raise StoreError(f"{folder} has no result", remedy="dimefm evaluate MODEL SET... writes them")
    columns = [_measured_column(folder, pooled) for folder, pooled in zip(folders, models, strict=True)]
    _require_common(folders, columns)
    if published:
        text = (resources.files("dimefm.evaluation") / "published.json").read_text(encoding="utf-8")
        columns += [_published_column(row) for row in json.loads(text)]
    return Comparison(columns, _notes(models))


def _require_common(folders: Sequence[str], columns: list[Column]) -> None:
    lines = [name for model in columns for name in model.cells]
    if len(columns) > 1 and len(set(lines)) == len(lines):
        found = "".join(
            f"\n  - {folder}: {', '.join([*model.cells][:3])}" for folder, model in zip(folders, columns, strict=True)
        )
        what = f"the models have no set and protocol in common{found}"
        raise StoreError(what, remedy="evaluate them on the same sets, or compare one alone with the published rows")


def write_comparison(table: Comparison, path: str) -> None:
    """Write the table in the format that the end of `path` names: .md, .csv or .tex. Raises DimefmError for another."""
    kinds = {".md": table.markdown, ".csv": table.csv, ".tex": table.latex}
    if (kind := Path(path).suffix) not in kinds:
        what = f"{path} does not end in {', '.join(kinds)}"
        raise DimefmError(what, remedy="give --out a name that ends in one of them")
    storage.write_atomic(storage.absolute(path), kinds[kind]().encode())


def _measured_column(folder: str, pooled: list[Pooled]) -> Column:
    cells = {_line_name(one): _cell(one) for one in pooled}
    for one in measured_suites(pooled):
        low, high = one.interval
        share = "" if len(one.sets) == one.total else f" ({len(one.sets)} of {one.total})"
        mark = "*" if one.partial else ""
        cells[f"{one.suite} {_short(one.protocol)}"] = f"{100 * one.mean:.1f} ± {50 * (high - low):.1f}{mark}{share}"
    name = Path(folder).parent.name if folder.endswith(".jsonl") else Path(folder).name
    return Column(name, "measured", cells)


def _cell(one: Pooled) -> str:
    deviation = "" if one.deviation is None else f" ± {100 * one.deviation:.1f}"
    return f"{100 * one.value:.1f}{deviation}{'*' if one.partial else ''}"


def _line_name(one: Pooled) -> str:
    return f"{one.title} {_short(one.protocol)}"


def _notes(models: list[list[Pooled]]) -> list[str]:
    """What a reader must know: what the marks mean, and which lines compare numbers that are not comparable."""
    notes = ["±: half of the 95% interval of a mean; for few-shot, the standard deviation over seeds"]
    if any(result.partial for model in models for result in model):
        notes.append("*: not the whole published set, see results.jsonl")
    seen: dict[str, Pooled] = {}
    for one in (one for model in models for one in model):
        first = seen.setdefault(_line_name(one), one)
        if differing := _differing(first.digests, one.digests):
            notes.append(f"{_line_name(one)}: the models were not measured on the same {differing}")
        if differing := _differing(first.conditions, one.conditions):
            notes.append(f"{_line_name(one)}: the models were not measured with the same {differing}")
    sets: dict[str, list[str]] = {}
    for mean in (mean for model in models for mean in measured_suites(model)):
        name, titles = f"{mean.suite} {_short(mean.protocol)}", sorted(one.title for one in mean.sets)
        if sets.setdefault(name, titles) != titles:
            notes.append(f"{name}: the means are not over the same sets")
    return list(dict.fromkeys(notes))


def _differing(first: Mapping[str, object], other: Mapping[str, object]) -> str:
    return " and ".join(name for name in first if first[name] != other.get(name))


def _published_column(row: dict[str, object]) -> Column:
    values = row["values"]
    assert isinstance(values, dict)
    lines = {
        "imagenet1k": "imagenet1k zero-shot",
        "elevater": "elevater zero-shot",
        "elevater_linear_probe": f"elevater {_short('linear-probe/elevater, test-selected')}",
        "robustness": "robustness zero-shot",
    }
    cells = {lines[name]: f"{100 * value:.1f}" for name, value in values.items() if value is not None}
    corpus = f" ({row['text_corpus']})" if row["text_corpus"] else ""
    return Column(f"{row['model']}{corpus}", f"{PUBLISHED}: {row['source']}", cells)


def _short(protocol: str) -> str:
    return protocol.replace("elevater, test-selected", "test-selected")


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(inert_text.latex, cells)) + r" \\"
