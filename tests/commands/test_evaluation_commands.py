"""What `evaluate` and `compare` take and print: config files, older names of options, JSON, mistyped folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import Evaluation
from dimefm.evaluation.results import read_results
from tests.commands.test_cli import labelled_set, refused, run
from tests.making import make_jpeg, write_text


def test_compare_of_a_mistyped_folder_names_one_that_is_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student", "teacher"):
        write_text(tmp_path / "evaluations" / name / "results.jsonl", [])
    monkeypatch.chdir(tmp_path)
    for typed in ("studnet", "evaluations/studnet", "student", "evalations/student"):
        assert "did you mean 'evaluations/student'?" in refused("compare", typed)


def test_a_config_file_lies_below_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluationConfig] = []
    done = Evaluation(str(tmp_path / "out"))
    monkeypatch.setattr("dimefm.evaluation.evaluate.evaluate", lambda config, report: asked.append(config) or done)
    monkeypatch.chdir(tmp_path)
    for name in ("pets", "zoo"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.yaml").write_text(
        "model: hf-hub:a/b\nfolders: pets\ntasks: few-shot\nshots: [1, 2]\nbatch_size: 8\n"
        "skip_existing: true\ntrained: {mean: [0.5, 0.5, 0.5]}\nname: null\n"
    )
    words = ["evaluate", "--config", tmp_path / "a.yaml"]
    assert run(*words).exit_code == 0
    assert (asked[-1].model, asked[-1].folders, asked[-1].tasks) == ("hf-hub:a/b", ("pets",), ("few-shot",))
    assert (asked[-1].shots, asked[-1].batch_size, asked[-1].skip_existing) == ((1, 2), 8, True)
    assert (asked[-1].trained.mean, asked[-1].seeds, asked[-1].name) == ((0.5, 0.5, 0.5), (0, 1, 2), None)
    assert run(*words, "hf-hub:c/d", "zoo", "--shots", "5", "--batch-size", "4").exit_code == 0
    assert (asked[-1].model, asked[-1].folders, asked[-1].shots) == ("hf-hub:c/d", ("zoo",), (5,))
    (tmp_path / "b.json").write_text('{"task": "few-shot", "batch_size": "many"}')
    wrong = run("evaluate", "m", "s", "--config", tmp_path / "b.json")
    assert wrong.exit_code == 2
    assert "no field is called 'task': did you mean 'tasks'?" in wrong.stderr


def test_the_older_name_of_probe_selection_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluationConfig] = []
    done = Evaluation(str(tmp_path / "out"))
    monkeypatch.setattr("dimefm.evaluation.evaluate.evaluate", lambda config, report: asked.append(config) or done)
    for option in (["--selection", "elevater"], ["--selection=elevater"], ["--probe-selection", "elevater"]):
        assert run("evaluate", "hf-hub:a/b", tmp_path, "--task", "linear-probe", *option).exit_code == 0
        assert asked[-1].selection == "elevater"
    assert "--selection" not in run("evaluate", "--help").stdout.replace("--probe-selection", "")


def test_evaluate_and_compare_as_json_are_one_document(tmp_path: Path, teacher_name: str) -> None:
    pets = labelled_set(tmp_path / "pets", {"0.jpg": make_jpeg(), "0.cls": b"1"})
    bad = labelled_set(tmp_path / "zoo", {"0.jpg": make_jpeg()})
    for name in ("cat", "red_bus"):
        (tmp_path / "plain" / name).mkdir(parents=True)
        (tmp_path / "plain" / name / "0.jpg").write_bytes(make_jpeg())
    words = ["--device", "cpu", "--out", tmp_path / "out", "--name", "m", "--json"]
    result = run("evaluate", teacher_name, pets, tmp_path / "plain", bad, *words)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    found, plain = document["results"]
    assert any(note.startswith("no classnames.txt: class names are those of the folders") for note in plain["notes"])
    assert found["metrics"] == read_results(str(tmp_path / "out" / "m"))[0].metrics
    assert document["results_file"] == f"{tmp_path}/out/m/results.jsonl"
    assert [one["set"] for one in document["failed"]] == ["zoo"]
    assert document["failed"][0]["remedy"]
    line, _ = json.loads(run("compare", tmp_path / "out" / "m", "--json").stdout)["lines"]
    assert (line["title"], line["values"][0]["value"]) == ("own-pets", found["metrics"]["top1"])
