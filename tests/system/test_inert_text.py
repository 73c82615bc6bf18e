"""Names that hold escape sequences, line ends, HTML, cells or formulas do nothing where they are shown."""

from __future__ import annotations

import ast
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cache_schemas import Failure
from dimefm.cli import cli
from dimefm.datasets.image_set import ImageSet
from dimefm.evaluation.compare import Cell, Column, Comparison, Line
from dimefm.evaluation.predictions import _summary
from dimefm.retrieval.search import show
from dimefm.retrieval.searched import Hit
from dimefm.selection.report import _short
from dimefm.sources.base import ImageSample
from dimefm.system import inert_text
from tests.making import make_jpeg

EVIL = "a\x1b]0;owned\x07\x1b[2K\rb\nOK: all is well|<img src=x onerror=alert(1)>`[x](http://y)\x9b31m\u202egpj\udcff"


def is_inert(shown: str) -> bool:
    return not any(c in shown for c in "\x1b\x07\r\x9b\u202e\udcff")


def test_a_terminal_gets_no_control_character() -> None:
    assert inert_text.text("a\tb\nc, é 日本 \u200f") == "a\tb\nc, é 日本 \u200f"
    assert is_inert(inert_text.text(EVIL))
    assert inert_text.text("\x1b[2K") == "\\x1b[2K"
    assert inert_text.line("a\nb\tc") == "a\\nb\\tc"
    assert inert_text.text("\udcff").encode() == b"\\udcff"  # a name that is not UTF-8 could not even be printed


def test_markdown_begins_nothing() -> None:
    shown = inert_text.markdown(EVIL)
    assert is_inert(shown)
    assert "\n" not in shown
    assert "<" not in shown
    assert "\\|&lt;img" in shown
    assert "\\`\\[x\\](" in shown


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_gets_no_formula(cell: str) -> None:
    assert inert_text.csv_cell(cell)[0] in "'\\"


@pytest.mark.parametrize("cell", ["-1.5", "+2", "61.3 ± 0.4*", "", "1e-3"])
def test_numbers_and_ordinary_cells_stay_as_they_are(cell: str) -> None:
    assert inert_text.csv_cell(cell) == cell


def test_latex_runs_no_command() -> None:
    assert inert_text.latex(r"\input{/etc/passwd}$^~") == (
        r"\textbackslash{}input\{/etc/passwd\}\$\textasciicircum{}\textasciitilde{}"
    )


def test_a_table_of_models_is_inert_in_every_form() -> None:
    model = Column(f"=1{EVIL}\\input{{x}}", "measured", {Line(EVIL, "zero-shot"): Cell(0.613)})
    table = Comparison([model], [f"{EVIL}: a note"])
    lines = table.markdown().splitlines()
    assert [line.count(" | ") for line in lines[:4]] == [1, 1, 1, 1]
    assert len(lines) == 6
    for shown in (table.markdown(), table.csv(), table.latex()):
        assert is_inert(shown)
    cells = list(csv.reader(io.StringIO(table.csv())))
    assert cells[0][1].startswith("'=1")
    assert "\\input" not in table.latex()
    assert table.latex().splitlines()[-1].startswith("% ")


def test_a_summary_of_predictions_keeps_its_rows() -> None:
    samples = [ImageSample(EVIL, "f", 0, 1), ImageSample("k", "f", 0, 1)]
    images = ImageSet(name=EVIL, split="test", where="w", layout="l", samples=samples, files=[],
                      labels=np.array([0, 1]), classnames=(EVIL, "b|c"), templates=("{}",))  # fmt: skip
    failures = [Failure(row=0, key=EVIL, file="f", status="UNDECODABLE", reason=EVIL)]
    shown = _summary(images, np.array([1, 0]), np.array([False, False]), failures)
    assert is_inert(shown)
    assert "<img" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5, 4}


def test_sentences_and_keys_are_inert_in_the_lines_of_search_and_of_a_selection() -> None:
    for entry in ({"text": EVIL, "key": EVIL}, {"key": EVIL, "file": EVIL}):
        shown = show("q", [Hit(0.5, 3, entry)])
        assert is_inert(shown)
        assert all(line.startswith(" " * 17) for line in shown.splitlines()[2:])
    assert is_inert(_short(EVIL))
    assert "<" not in _short(EVIL)


def test_the_command_line_shows_names_of_files_and_of_documents_inert(tmp_path: Path, teacher_name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "\x1b[2Ka\nstatus  OK 5.jpg").write_bytes(b"no image")
    (folder / "b.jpg").write_bytes(make_jpeg())
    out = tmp_path / "s.zarr"
    words = ["cache-images", str(folder), "--teacher", teacher_name, "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*words, "--workers", "1"])
    assert result.exit_code == 0, result.output
    for words in (["info", str(out)], ["info", str(out), "--failures"], ["verify", str(out)]):
        shown = CliRunner().invoke(cli, words).output
        assert is_inert(shown)
        assert "\n  status  OK 5" not in shown
    assert "\\x1b[2Ka\\nstatus  OK 5" in CliRunner().invoke(cli, ["info", str(out)]).output


def test_an_error_is_inert(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["info", str(tmp_path / "\x1b[2Kx")])
    assert result.exit_code == 1
    assert is_inert(result.output)
    assert "\\x1b[2Kx does not exist" in result.output


def test_every_command_prints_through_one_function() -> None:
    root = Path(__file__).parents[2]
    for house in ("dimefm", "pipeline"):
        for path in (root / house).rglob("*.py"):
            if path.name == "inert_text.py" or "sample" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("click.echo", "click.secho"), f"{path}:{node.lineno}"
