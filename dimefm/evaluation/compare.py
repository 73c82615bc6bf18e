"""`dimefm compare`: models side by side with the rows that the paper published, as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from cache_schemas.latency import Latency
from dimefm.errors import DimefmError, StoreError
from dimefm.evaluation.results import Pooled, pool, read_results
from dimefm.evaluation.speed import SPEED, Quantity, chosen, quantities, speed_notes
from dimefm.evaluation.suite_means import measured_suites
from dimefm.system import inert_text, storage
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import hanging

PUBLISHED = "published"
_MEANS = ("elevater", "robustness")
_RULES = {
    "honest": "honest: validation images alone chose the settings of the probe",
    "test-selected": "test-selected: the best epoch on the test images counts, as in the code of ELEVATER",
}
_LONGEST_SET, _LONGEST_MODEL = 32, 20  # letters of a name in a table for a terminal


class Line(NamedTuple):
    """What a line of the table compares: a set, or the mean of a suite, under a protocol; or a figure of speed."""

    title: str
    protocol: str

    def __str__(self) -> str:
        return self.title if self.protocol == SPEED else f"{self.title} {self.protocol}"

    @property
    def kind(self) -> str:
        return SPEED if self.protocol == SPEED else "mean" if self.title in _MEANS else "set"


@dataclass(frozen=True)
class Cell:
    """A number in [0, 1]. Of a measured one also its interval and whether its set is `partial`; of few-shot the
    standard deviation over seeds; of a mean how many sets it is over, and how many the suite has."""

    value: float
    interval: tuple[float, float] | None = None
    deviation: float | None = None
    partial: bool = False
    sets: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        spread = self.deviation
        if self.sets is not None and self.interval is not None:
            spread = (self.interval[1] - self.interval[0]) / 2
        text = f"{100 * self.value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
        share = "" if self.sets == self.total else f" ({self.sets} of {self.total})"
        return f"{text}{'*' if self.partial else ''}{share}"


@dataclass(frozen=True)
class Column:
    """The column of a model: its name, where its numbers come from, and a number for each line that it has."""

    name: str
    source: str
    cells: dict[Line, Cell | Quantity]


@dataclass(frozen=True)
class Comparison:
    """A table with a column per model, and a line for ImageNet-1K, for each mean, for each set and protocol, and for
    each figure of speed."""

    models: list[Column]
    notes: list[str]

    def names(self) -> list[Line]:
        """What the lines compare: ImageNet-1K and the means first, speed last."""
        found = list(dict.fromkeys(name for model in self.models for name in model.cells))
        return sorted(found, key=lambda name: (name.kind == SPEED, name.title not in ("imagenet1k", *_MEANS)))

    def lines(self) -> list[list[str]]:
        """The cells below the head."""
        return [[str(name), *(_text(model, name) for model in self.models)] for name in self.names()]

    def head(self) -> list[list[str]]:
        """The names of the models, and below each where its numbers come from."""
        return [["", *(model.name for model in self.models)], ["source", *(model.source for model in self.models)]]

    def markdown(self) -> str:
        """One table, for a README."""
        names, sources = self.head()
        rows = [[*map(inert_text.markdown, row)] for row in (names, sources, *self.lines())]
        notes = [inert_text.markdown(note).replace("*", "\\*") for note in self.notes]
        table = markdown_table(rows, align="l" + "r" * len(self.models))
        return "\n".join([*table, *(f"\n{note}" for note in notes), ""])

    def shown(self, width: int) -> str:
        """The same for a terminal of `width` columns, still in Markdown: a table per protocol, split into several where
        the models do not fit beside each other. Names that are long have numbers, and a note each."""
        heads, notes = self._heads()
        tables = [table for protocol in dict.fromkeys(name.protocol for name in self.names())
                  for table in self._split(protocol, heads, width)]  # fmt: skip
        words = [inert_text.markdown(note).replace("*", "\\*") for note in (*notes, *self.notes)]
        return "\n\n".join([*("\n".join(table) for table in tables), *(hanging("", note) for note in words)]) + "\n"

    def _heads(self) -> tuple[list[str], list[str]]:
        """A short name for each model, and a note for each that is not its whole name."""
        heads, notes, count = [], [], {"model": 0, PUBLISHED: 0}
        for model in self.models:
            kind = PUBLISHED if model.source.startswith(PUBLISHED) else "model"
            if kind == "model" and len(model.name) <= _LONGEST_MODEL:
                heads.append(model.name)
                continue
            count[kind] += 1
            heads.append(f"{kind} {count[kind]}")
            by = model.source.removeprefix(f"{PUBLISHED}: ")
            notes.append(f"{heads[-1]}: {model.name}" + (f" (by {by})" if kind == PUBLISHED else ""))
        return heads, notes

    def _split(self, protocol: str, heads: list[str], width: int) -> Iterator[list[str]]:
        """The lines of each table of a protocol; of the models that have a number in it."""
        names = [name for name in self.names() if name.protocol == protocol]
        first = [protocol, *(_cut(f"mean of {n.title}" if n.title in _MEANS else n.title) for n in names)]
        columns = [
            [head, *(_text(model, name) for name in names)] for head, model in zip(heads, self.models, strict=True)
        ]
        waiting = [[inert_text.markdown(cell) for cell in column] for column in columns if any(column[1:])]
        first = [inert_text.markdown(cell) for cell in first]
        while waiting:
            taken = 1
            while taken < len(waiting) and _width([first, *waiting[: taken + 1]]) <= width:
                taken += 1
            rows = [row for row in zip(first, *waiting[:taken], strict=True) if any(row[1:])]
            yield markdown_table(rows, align="l" + "r" * taken, padded=True)
            del waiting[:taken]

    def plain(self) -> dict[str, Any]:
        """For JSON: the models, the lines with a value per model or null, and the notes."""
        cells = [[model.cells.get(name) for model in self.models] for name in self.names()]
        return {
            "models": [{"name": model.name, "source": model.source} for model in self.models],
            "lines": [
                {"of": name.kind, **name._asdict(), "values": [*map(_plain, row)]}
                for name, row in zip(self.names(), cells, strict=True)
            ],
            "notes": self.notes,
        }

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


def _text(model: Column, name: Line) -> str:
    return str(model.cells.get(name, ""))


def _plain(cell: Cell | Quantity | None) -> dict[str, Any] | None:
    if isinstance(cell, Quantity):
        return {"value": cell.value}
    return None if cell is None else {name: value for name, value in asdict(cell).items() if value is not None}


def _cut(name: str) -> str:
    """A long name without its middle."""
    half = (_LONGEST_SET - 3) // 2
    return name if len(name) <= _LONGEST_SET else f"{name[:half]}...{name[-half:]}"


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Of a table with these columns."""
    return sum(max(map(len, column)) + 3 for column in columns) + 1


def compare(
    folders: Sequence[str], *, published: bool = True, latency: Latency | None = None, require_common: bool = True
) -> Comparison:
    """The results in these folders (or results.jsonl files), one column for each, and the published numbers on lines
    that one of them has; with `latency`, what that knows of the same weights. Raises StoreError for a folder without
    results and, with `require_common`, if the models have no line in common."""
    results = [read_results(folder) for folder in folders]
    models = [*map(pool, results)]
    for folder, pooled in zip(folders, models, strict=True):
        if not pooled:
            raise StoreError(f"{folder} has no result", remedy="dimefm evaluate MODEL SET... writes them")
    columns = [_measured_column(folder, pooled) for folder, pooled in zip(folders, models, strict=True)]
    if require_common:
        _require_common(folders, columns)
    if published:
        text = (resources.files("dimefm.evaluation") / "published.json").read_text(encoding="utf-8")
        shared = {name for column in columns for name in column.cells}
        columns += [column for row in json.loads(text) if (column := _published_column(row, shared)).cells]
    notes = _notes(models, columns)
    if latency is not None:
        found = chosen(latency, [{str(one.model["weights"]) for one in of} for of in results])
        for column, one in zip(columns, found, strict=False):  # then come the published ones
            column.cells.update({Line(name, SPEED): value for name, value in (quantities(one) if one else ())})
        notes += speed_notes(latency, [column.name for column in columns[: len(found)]], found)
    return Comparison(columns, notes)


def _require_common(folders: Sequence[str], columns: list[Column]) -> None:
    lines = [name for model in columns for name in model.cells]
    if len(columns) > 1 and len(set(lines)) == len(lines):
        found = "".join(
            f"\n  - {folder}: {', '.join(map(str, [*model.cells][:3]))}"
            for folder, model in zip(folders, columns, strict=True)
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
    cells: dict[Line, Cell | Quantity] = {
        _line(one): Cell(one.value, one.interval, one.deviation, bool(one.partial)) for one in pooled
    }
    for one in measured_suites(pooled):
        mean = Cell(one.mean, one.interval, None, bool(one.partial), len(one.sets), one.total)
        cells[Line(one.suite, _short(one.protocol))] = mean
    name = Path(folder).parent.name if folder.endswith(".jsonl") else Path(folder).name
    return Column(name, "measured", cells)


def _line(one: Pooled) -> Line:
    return Line(one.title, _short(one.protocol))


def _notes(models: list[list[Pooled]], columns: list[Column]) -> list[str]:
    """What a reader must know: what the marks mean, and which lines compare numbers that are not comparable."""
    protocols = " ".join(result.protocol for model in models for result in model)
    spread = any("±" in str(cell) for column in columns for cell in column.cells.values())
    words = ["±: half of the 95% interval of a mean; for few-shot, the standard deviation over seeds"] if spread else []
    words += [text for word, text in _RULES.items() if word in protocols]
    notes = ["; ".join(words)] if words else []
    if any(result.partial for model in models for result in model):
        notes.append("*: not the whole published set, see results.jsonl")
    seen: dict[Line, Pooled] = {}
    for one in (one for model in models for one in model):
        first = seen.setdefault(_line(one), one)
        if differing := _differing(first.digests, one.digests):
            notes.append(f"{_line(one)}: the models were not measured on the same {differing}")
        if differing := _differing(first.conditions, one.conditions):
            notes.append(f"{_line(one)}: the models were not measured with the same {differing}")
    sets: dict[str, list[str]] = {}
    for mean in (mean for model in models for mean in measured_suites(model)):
        name, titles = f"{mean.suite} {_short(mean.protocol)}", sorted(one.title for one in mean.sets)
        if sets.setdefault(name, titles) != titles:
            notes.append(f"{name}: the means are not over the same sets")
    return list(dict.fromkeys(notes))


def _differing(first: Mapping[str, object], other: Mapping[str, object]) -> str:
    return " and ".join(name for name in first if first[name] != other.get(name))


def _published_column(row: dict[str, Any], shared: set[Line]) -> Column:
    """The published numbers on the lines `shared`."""
    lines = {
        "imagenet1k": Line("imagenet1k", "zero-shot"),
        "elevater": Line("elevater", "zero-shot"),
        "elevater_linear_probe": Line("elevater", _short("linear-probe/elevater, test-selected")),
        "robustness": Line("robustness", "zero-shot"),
    }
    values = {lines[name]: value for name, value in row["values"].items() if value is not None}
    corpus = f" ({row['text_corpus']})" if row["text_corpus"] else ""
    cells: dict[Line, Cell | Quantity] = {name: Cell(value) for name, value in values.items() if name in shared}
    return Column(f"{row['model']}{corpus}", f"{PUBLISHED}: {row['source']}", cells)


def _short(protocol: str) -> str:
    return protocol.replace("elevater, test-selected", "test-selected")


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(inert_text.latex, cells)) + r" \\"
