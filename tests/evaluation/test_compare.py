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
from dimefm.evaluation.summary import suite_means


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


def notes(tmp_path: Path, *models: list[EvaluationResult]) -> list[str]:
    folders = []
    for number, results in enumerate(models):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in results))
        folders.append(str(folder))
    return compare(folders, published=False).notes[1:]


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
    sets[-1] = result("imagenet1k", "imagenet", partial=part)
    shown = {name: text for name, text in suite_means(sets) if name.startswith("effective")}
    assert shown["effective robustness, imagenet_a"].endswith("points, of a part of imagenet1k")


def test_a_set_of_no_published_table_has_its_line_but_is_in_no_mean(tmp_path: Path) -> None:
    sets = [result("dtd"), result("birds", "more", metrics={"top1": 1.0}, intervals={"top1": (1.0, 1.0)})]
    ((name, text),) = suite_means(sets)
    assert name == "elevater zero-shot"
    assert text.startswith(" 50.0%")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in sets))
    (model,) = compare([str(folder)], published=False).models
    assert list(model.cells) == ["dtd zero-shot", "birds zero-shot", "elevater zero-shot"]


def test_the_suite_more_is_of_its_own_and_part_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: one for name, one in load_definitions().items() if one.suite != "more"}
    monkeypatch.setattr(config, "load_definitions", lambda: known)
    with pytest.raises(SourceError, match="no known set has the suite more"):
        choose_sets(EvaluationConfig(model="m", suite="more", data="sets"))
    added = dataclasses.replace(known["dtd"], name="birds", suite="more", elevater=None)
    monkeypatch.setattr(config, "load_definitions", lambda: {**known, "birds": added})
    assert [one.name for one in choose_sets(EvaluationConfig(model="m", suite="more", data="sets"))] == ["birds"]
    assert {one.name for one in choose_sets(EvaluationConfig(model="m", suite="all", data="sets"))} == {*known, "birds"}
