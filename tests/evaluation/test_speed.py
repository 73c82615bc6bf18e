"""Speed beside accuracy: the lines that a comparison gets, and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from dimefm.cli import cli
from dimefm.errors import DimefmError
from dimefm.evaluation.compare import Comparison, compare
from dimefm.evaluation.speed import Point, Points, points
from dimefm.latency.plot import draw
from dimefm.latency.record import read_latency
from tests.evaluation.test_compare import result, written
from tests.latency.test_latency import measured, timing
from tests.latency.test_latency import written as measurements


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Results of a student, of its export, and of its teacher, which was measured on a set more."""
    found = []
    for name, top1 in (("student", 0.4), ("onnx", 0.5), ("teacher", 0.8)):
        scores: dict[str, Any] = {"model": {"precision": "fp32", "weights": name}, "metrics": {"top1": top1}}
        more = [result("eurosat", **scores)] if name == "teacher" else []
        found.append(written(tmp_path / name, [result("dtd", **scores), result("gtsrb", **scores), *more]))
    return found


@pytest.fixture
def latency(tmp_path: Path) -> str:
    models = [
        measured(weights="student", backend="compiled", image=(timing(1, 1.0),)),
        measured(weights="student", threads=1, image=(timing(1, 7.0),)),
        measured(weights="student", image=(timing(1, 4.0), timing(64, 2.0))),
        measured(weights="onnx", backend="int8", threads=1, image=(timing(1, 3.0), timing(64, 0.1))),
        measured(weights="onnx", backend="int8", image=(timing(1, 0.5), timing(64, 0.1))),
        measured(weights="other", threads=64),
    ]
    return measurements(tmp_path / "latency.json", models)


def compared(folders: list[str], latency: str) -> Comparison:
    return compare(folders, published=False, latency=read_latency(latency))


def test_a_comparison_gets_the_measurements_of_the_same_weights(folders: list[str], latency: str) -> None:
    """Uncompiled, and with as many threads as most of the models."""
    table = compared(folders, latency)
    lines = {line[0]: line[1:] for line in table.lines()}
    assert lines["ms per image, batch 1"] == ["4", "0.5", ""]
    assert lines["images/s, batch 64"] == ["500", "10,000", ""]
    assert lines["parameters"] == ["3.0 M", "3.0 M", ""]
    assert lines["GFLOP per image"][0] == "5"
    assert lines["MB on disk"][0] == "12.0"
    assert [*lines][:4] == ["elevater zero-shot", "dtd zero-shot", "gtsrb zero-shot", "eurosat zero-shot"]
    (note,) = [note for note in table.notes if note.startswith("speed")]
    for words in ("pytorch in fp32, 2 threads: student", "; int8, 2 threads: onnx", "not measured: teacher"):
        assert words in note
    assert {
        "of": "speed",
        "title": "parameters",
        "protocol": "speed",
        "values": [{"value": 3e6}, {"value": 3e6}, None],
    } in (table.plain()["lines"])
    assert "| speed" in table.shown(80)


def test_the_plot_is_of_the_sets_that_all_have(folders: list[str], latency: str) -> None:
    found = points(compared(folders, latency), read_latency(latency))
    assert found.points == [Point("student", 4.0, 0.4), Point("onnx", 0.5, 0.5)]
    assert found.along == "zero-shot, mean of 2 sets, %"
    assert found.across.startswith("ms per image, batch 1; ")
    with pytest.raises(DimefmError, match="no model has both"):
        points(compared(folders[2:], latency), read_latency(latency))


def test_compare_writes_tables_and_the_plot(folders: list[str], latency: str, tmp_path: Path) -> None:
    words = ["compare", *folders, "--latency", latency, "--plot", str(tmp_path / "plot.png")]
    done = CliRunner().invoke(cli, [*words, *(f"--out={tmp_path}/t.{end}" for end in ("md", "csv", "tex"))])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for end in ("md", "csv", "tex"):
        assert "ms per image, batch 1" in (tmp_path / f"t.{end}").read_text()


def test_a_difference_that_is_noise_does_not_fill_the_axis() -> None:
    axes = Figure().subplots()
    draw(axes, Points([Point("student", 1.0, 0.4237), Point("int8", 0.5, 0.4242)], "ms", "%"))
    low, high = axes.get_ylim()
    assert low < 42.37 < 42.42 < high
    assert high - low > 5


def test_labels_cover_neither_each_other_nor_points() -> None:
    """Two models at nearly the same place, and two far away, on a logarithmic axis."""
    names = ("student", "student-onnx", "student-int8", "teacher")
    spots = ((1.0, 0.5), (1.02, 0.502), (0.2, 0.5), (90.0, 0.8))
    axes = Figure().subplots()
    draw(axes, Points([Point(name, *spot) for name, spot in zip(names, spots, strict=True)], "ms", "%"))
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == list(names)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])
    marks = [axes.transData.transform((ms, 100 * accuracy)) for ms, accuracy in spots]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
