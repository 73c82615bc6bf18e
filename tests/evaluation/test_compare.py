"""What a comparison and a summary say of numbers that are not of the same thing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cache_schemas.evaluation import EvaluationResult
from dimefm.datasets.definitions import load_definitions
from dimefm.errors import SourceError
from dimefm.evaluation import config
from dimefm.evaluation.compare import compare
from dimefm.evaluation.config import EvaluationConfig, choose_sets
from dimefm.evaluation.summary import result_text, suite_means


def result(name: str, suite: str = "elevater", **changes: Any) -> EvaluationResult:
    fields: dict[str, Any] = {
        "set": name,
        "suite": suite,
        "protocol": "zero-shot",
        "metric": "top1",
        "metrics": {"top1": 0.5},
        "intervals": {"top1": (0.45, 0.55)},
        "images": 100,
        "expected": 100,
        "classes": 10,
        "unreadable": 0,
        "partial": (),
        "model": {"precision": "fp32", "weights": "w"},
        "digests": {"images": "i", "classes": "c"},
        "settings": {"decoder": "pillow", "resize": "model"},
        "versions": {},
        "device": "cpu",
        "seconds": 1.0,
        "finished": "now",
    }
    return EvaluationResult(**(fields | changes))


def written(folder: Path, results: list[EvaluationResult]) -> str:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in results))
    return str(folder)


def notes(tmp_path: Path, *models: list[EvaluationResult]) -> list[str]:
    folders = [written(tmp_path / str(number), results) for number, results in enumerate(models)]
    return [note for note in compare(folders, published=False).notes if not note.startswith("±")]


def test_a_mark_is_explained_where_it_is_shown(tmp_path: Path) -> None:
    own = compare([written(tmp_path / "own", [result("own-pets", suite="own")])], published=False)
    assert "±" not in own.shown(80)
    assert own.notes == []
    mean = compare([written(tmp_path / "mean", [result("dtd")])], published=False)
    assert mean.shown(80).count("±") > 1
    assert mean.notes[0].startswith("±: half")


def test_the_same_conditions_need_no_note(tmp_path: Path) -> None:
    assert notes(tmp_path, [result("dtd"), result("mnist")], [result("mnist"), result("dtd")]) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"settings": {"decoder": "fast", "resize": "model"}}, "decoder"),
        ({"settings": {"decoder": "pillow", "resize": "squash"}}, "resizing"),
        ({"model": {"precision": "bf16", "weights": "w"}}, "precision"),
        ({"settings": {"decoder": "pillow", "resize": "model", "train": "x"}}, "training images"),
    ],
)
def test_other_conditions_are_noted(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    found = notes(tmp_path, [result("dtd")], [result("dtd", **changes)])
    assert found == [f"dtd zero-shot: the models were not measured with the same {what}"]


def test_means_over_other_sets_and_other_seeds_are_noted(tmp_path: Path) -> None:
    def few(seed: int) -> EvaluationResult:
        settings = {"decoder": "pillow", "resize": "model", "seed": seed}
        return result("dtd", protocol=f"few-shot-5/honest/seed-{seed}", settings=settings)

    found = notes(tmp_path, [result("dtd"), few(0), few(1)], [result("mnist"), few(0)])
    assert found == [
        "dtd few-shot-5/honest: the models were not measured with the same seeds",
        "elevater zero-shot: the means are not over the same sets",
    ]


def test_robustness_of_partial_sets_is_said(tmp_path: Path) -> None:
    part = ("1,000 of 50,000 images",)
    sets = [result(name, "robustness") for name in ("imagenetv2", "imagenet_a", "imagenet_sketch", "objectnet")]
    sets += [result("imagenet_r", "robustness", partial=part), result("imagenet1k", "imagenet")]
    shown = {name: text for name, text in suite_means(sets) if name.startswith("effective")}
    assert shown["effective robustness, imagenet_a"].endswith("points")
    assert shown["effective robustness, imagenet_r"].endswith("points, of a part of imagenet_r")
    assert shown["effective robustness, mean"].endswith("points, of partial sets")
    sets[4:] = [result("imagenet_r", "robustness"), result("dtd", partial=part), result("imagenet1k", "imagenet")]
    shown = {name: text for name, text in suite_means(sets) if name.startswith("effective")}
    assert shown["effective robustness, mean"].endswith("points"), "dtd is no shift of ImageNet"
    sets[-1] = result("imagenet1k", "imagenet", partial=part)
    shown = {name: text for name, text in suite_means(sets) if name.startswith("effective")}
    assert shown["effective robustness, imagenet_a"].endswith("points, of a part of imagenet1k")


def test_a_set_of_no_published_table_has_its_line_but_is_in_no_mean(tmp_path: Path) -> None:
    sets = [result("dtd"), result("birds", "more", metrics={"top1": 1.0}, intervals={"top1": (1.0, 1.0)})]
    ((name, text),) = suite_means(sets)
    assert name == "elevater zero-shot"
    assert text.startswith(" 50.0%")
    (model,) = compare([written(tmp_path / "m", sets)], published=False).models
    assert [*map(str, model.cells)] == ["dtd zero-shot", "birds zero-shot", "elevater zero-shot"]


def test_the_suite_more_is_of_its_own_and_part_of_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {name: one for name, one in load_definitions().items() if one.suite != "more"}
    monkeypatch.setattr(config, "load_definitions", lambda: known)
    with pytest.raises(SourceError, match="no known set has the suite more"):
        choose_sets(EvaluationConfig(model="m", suite="more", data=str(tmp_path)))
    added = dataclasses.replace(known["dtd"], name="birds", suite="more", elevater=None)
    monkeypatch.setattr(config, "load_definitions", lambda: {**known, "birds": added})
    assert [one.name for one in choose_sets(EvaluationConfig(model="m", suite="more", data=str(tmp_path)))] == ["birds"]
    assert {one.name for one in choose_sets(EvaluationConfig(model="m", suite="all", data=str(tmp_path)))} == {
        *known,
        "birds",
    }


# -- as it is shown ---------------------------------------------------------------------------------------------------


def every_set(protocol: str) -> list[EvaluationResult]:
    return [result(one.name, one.suite, protocol=protocol) for one in load_definitions().values()]


def test_a_terminal_shows_a_table_per_protocol_that_it_does_not_break(tmp_path: Path) -> None:
    names = ("student", "student-ema-at-step-20000", "teacher")
    results = [*every_set("zero-shot"), *every_set("linear-probe/honest"), result("a" * 50, "own")]
    shown = compare([written(tmp_path / name, results) for name in names]).shown(80)
    assert all(len(line) <= 80 for line in shown.splitlines())
    tables = [block.splitlines() for block in shown.split("\n\n") if block.startswith("|")]
    heads = [[cell.strip() for cell in table[0].strip("|").split("|")] for table in tables]
    assert heads == [
        ["zero-shot", "student", "model 1", "teacher"],
        ["zero-shot", "published 1", "published 2", "published 3"],
        ["linear-probe/honest", "student", "model 1", "teacher"],
    ]
    assert "model 1: student-ema-at-step-20000" in shown
    assert "honest: validation images alone chose the settings of the probe" in " ".join(shown.split())
    assert len({len(line) for line in tables[0]}) == 1
    assert tables[0][1].endswith("-: |"), "Markdown's mark of a column that is aligned right"
    assert tables[0][2].startswith("| imagenet1k ")
    assert any(line.startswith(f"| own-{'a' * 10}...{'a' * 14} ") for line in tables[0])
    assert len(tables[1]) == 5, "of the published models the lines that they have"


def test_on_a_narrow_terminal_models_are_below_each_other(tmp_path: Path) -> None:
    folders = [written(tmp_path / name, [result("dtd")]) for name in ("student", "teacher")]
    table = compare(folders, published=False)
    assert table.shown(80).count("| zero-shot") == 1
    assert table.shown(50).count("| zero-shot") == 2
    assert len(table.shown(50).splitlines()[0]) <= 50


def test_what_was_published_is_shown_only_where_a_model_has_the_same_line(tmp_path: Path) -> None:
    assert len(compare([written(tmp_path / "pets", [result("pets", "own")])]).models) == 1
    of_imagenet = compare([written(tmp_path / "imagenet", [result("imagenet1k", "imagenet")])])
    assert len(of_imagenet.models) == 4
    assert [*map(str, of_imagenet.names())] == ["imagenet1k zero-shot"]


def test_as_a_document_a_comparison_has_a_value_per_model_or_null(tmp_path: Path) -> None:
    few = [result("dtd", protocol=f"few-shot-5/honest/seed-{seed}", metrics={"top1": seed / 4}) for seed in (1, 2)]
    folders = [written(tmp_path / "a", [result("dtd"), *few]), written(tmp_path / "b", [result("dtd")])]
    document = json.loads(json.dumps(compare(folders, published=False).plain()))
    assert document["models"] == [{"name": name, "source": "measured"} for name in ("a", "b")]
    lines = {(one["of"], one["title"], one["protocol"]): one["values"] for one in document["lines"]}
    assert lines["set", "dtd", "zero-shot"][1] == {"value": 0.5, "interval": [0.45, 0.55], "partial": False}
    assert lines["set", "dtd", "few-shot-5/honest"][1] is None
    assert lines["set", "dtd", "few-shot-5/honest"][0]["deviation"] == pytest.approx(0.177, abs=1e-3)
    assert lines["mean", "elevater", "zero-shot"][0]["total"] == 20


@pytest.mark.parametrize("protocol", ["zero-shot", "few-shot-20/honest/seed-2", "linear-probe/elevater, test-selected"])
def test_a_result_fits_into_80_columns(protocol: str) -> None:
    partial = ("1,000 of 50,000 images", "class names and templates are those of the folder (their order)")
    text = result_text(result("hateful_memes", protocol=protocol, partial=partial, notes=(12 * "word ",)))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.startswith(f"hateful_memes      {protocol}")
    assert "top-1  50.0% [45.0%, 55.0%]\n    100 images, 10 classes\n    partial: 1,000 of 50,000 images, " in text
