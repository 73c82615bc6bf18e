"""Models side by side, beside the rows that the paper published, as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cache_schemas.evaluation import EvaluationResult
from dimefm import storage
from dimefm.errors import DimefmError
from dimefm.evaluation import metrics
from dimefm.evaluation.definitions import load_definitions
from dimefm.evaluation.results import read_results

PUBLISHED = "published"


@dataclass(frozen=True)
class Row:
    """A model: its name, where the numbers are from, and a text for each column that it has."""

    model: str
    source: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of models under columns: ImageNet-1K and the means first, then every set and protocol."""

    columns: list[str]
    rows: list[Row]

    def markdown(self) -> str:
        """With a mark on what is published and not measured here."""
        head = ["model", "source", *self.columns]
        lines = [head, ["---", "---", *["---:"] * len(self.columns)]]
        lines += [[row.model, row.source, *self._cells(row)] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def csv(self) -> str:
        """For a spreadsheet."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(["model", "source", *self.columns])
        writer.writerows([row.model, row.source, *self._cells(row)] for row in self.rows)
        return sink.getvalue()

    def latex(self) -> str:
        """A tabular that needs booktabs."""
        lines = [rf"\begin{{tabular}}{{ll{'r' * len(self.columns)}}}", r"\toprule"]
        lines.append(_latex_line(["model", "source", *self.columns]))
        lines.append(r"\midrule")
        lines += [_latex_line([row.model, row.source, *self._cells(row)]) for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def _cells(self, row: Row) -> list[str]:
        return [row.cells.get(column, "") for column in self.columns]


def compare(folders: Sequence[str], *, published: bool = True) -> Table:
    """The results in these folders (or results.jsonl files), a row each. Raises StoreError for one without results."""
    rows = [_measured(folder, read_results(folder)) for folder in folders]
    if published:
        text = (resources.files("dimefm.evaluation") / "published.json").read_text(encoding="utf-8")
        rows += [_published(one) for one in json.loads(text)]
    found = dict.fromkeys(column for row in rows for column in row.cells)
    first = [c for c in found if c.split(" ")[0] in ("imagenet1k", "elevater", "robustness")]
    return Table([*first, *(c for c in found if c not in first)], rows)


def write_table(table: Table, path: str) -> None:
    """As the end of the name says: .md, .csv or .tex. Raises DimefmError for another."""
    kinds = {".md": table.markdown, ".csv": table.csv, ".tex": table.latex}
    if (kind := Path(path).suffix) not in kinds:
        raise DimefmError(f"{path} is none of {', '.join(kinds)}", remedy="give --out a name that ends in one of them")
    storage.write_atomic(storage.absolute(path), kinds[kind]().encode())


def _measured(folder: str, results: list[EvaluationResult]) -> Row:
    cells: dict[str, str] = {}
    for result in results:
        mark = "*" if result.partial else ""
        cells[f"{result.title} {_short(result.protocol)}"] = f"{100 * result.value:.1f}{mark}"
    for protocol in dict.fromkeys(r.protocol for r in results):
        for suite in ("elevater", "robustness"):
            those = [r for r in results if r.suite == suite and r.protocol == protocol]
            total = sum(d.suite == suite for d in load_definitions().values())
            if those:
                mean, (low, high) = metrics.mean_of([r.value for r in those], [r.interval for r in those])
                share = "" if len(those) == total else f" ({len(those)} of {total})"
                mark = "*" if any(r.partial for r in those) else ""
                cells[f"{suite} {_short(protocol)}"] = f"{100 * mean:.1f} ± {50 * (high - low):.1f}{mark}{share}"
    name = Path(folder).parent.name if folder.endswith(".jsonl") else Path(folder).name
    return Row(name, "measured", cells)


def _published(one: dict[str, object]) -> Row:
    values = one["values"]
    assert isinstance(values, dict)
    columns = {
        "imagenet1k": "imagenet1k zero-shot",
        "elevater": "elevater zero-shot",
        "elevater_linear_probe": f"elevater {_short('linear-probe/elevater, test-selected')}",
        "robustness": "robustness zero-shot",
    }
    cells = {columns[name]: f"{100 * value:.1f}" for name, value in values.items() if value is not None}
    corpus = f" ({one['text_corpus']})" if one["text_corpus"] else ""
    return Row(f"{one['model']}{corpus}", f"{PUBLISHED}: {one['source']}", cells)


def _short(protocol: str) -> str:
    return protocol.replace("elevater, test-selected", "test-selected")


def _latex_line(cells: Sequence[str]) -> str:
    safe = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "→": r"$\to$"}
    return " & ".join("".join(safe.get(c, c) for c in cell) for cell in cells) + r" \\"
