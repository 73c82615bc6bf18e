"""What a comparison and a summary say of numbers that are not of the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_schemas.evaluation import EvaluationResult
from dimefm.evaluation.compare import compare
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
