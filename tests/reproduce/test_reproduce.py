"""`make reproduce`: its commands, its forecast, its report. The whole of it runs in test_end_to_end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.errors import DimefmError, StoppedError
from dimefm.evaluation.results import read_results
from dimefm.reproduce import stages
from dimefm.reproduce.report import write_report
from dimefm.reproduce.stages import Scale, commands, main, run_all, sample_scale, smoke_scale
from dimefm.reproduce.tables import Student
from dimefm.store.embedding_store import Store
from dimefm.system.lock import writing
from dimefm.system.machine import cpus
from dimefm.training.run_folder import read_run
from tests.processes import result_of
from tests.tiny_training import STUDENT


@pytest.mark.parametrize("scale", [smoke_scale(), sample_scale()])
def test_every_stage_is_a_command_with_options_that_exist(scale: object, tmp_path: Path) -> None:
    stages = commands(scale, tmp_path)  # type: ignore[arg-type]
    assert [words[0] for _, words in stages] == [
        "cache-images", "cache-texts", "cache-texts", "build-index", "retrieve", "select-texts", "train-student",
        "export", "evaluate", "train-student", "export", "evaluate", "evaluate", "latency",
    ]  # fmt: skip
    for _, words in stages:
        command = cli.commands[words[0]]
        command.make_context(words[0], list(words[1:]))  # parses, and raises a usage error otherwise


def test_the_papers_job_is_forecast_without_its_data() -> None:
    result = CliRunner().invoke(main, ["--scale", "paper", "--dry-run"])
    assert result.exit_code == 0, result.output
    for part in ("40,000,000", "28,400,000", "61.5 GB", "ViT-L-14-quickgelu", "--recipe paper", "GPU hours"):
        assert part in result.output


def test_the_forecast_counts_data_that_is_there(sample: Path) -> None:
    words = ["--scale", "paper", "--dry-run", "--images", str(sample / "images"), "--texts", str(sample / "texts")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "5,268" in result.output
    assert "counted" in result.output


def test_the_papers_job_asks_for_its_data() -> None:
    result = CliRunner().invoke(main, ["--scale", "paper"])
    assert result.exit_code == 2
    assert "needs --images, --texts and --val" in result.output


@pytest.fixture(scope="module", params=["tiny", pytest.param("sample", marks=pytest.mark.slow)])
def teacher(request: pytest.FixtureRequest, teacher_name: str, sample_teacher: str) -> str:
    """One whose numbers mean nothing, which is enough for the job to run, and the sample's."""
    return sample_teacher if request.param == "sample" else teacher_name


_SMALL = ("--student", STUDENT, "--image-size", "32", "--batch-size", "16", "--epochs", "2", "--log-every", "2")
STUDENTS = (
    Student(name="paper", label="the paper's losses", recipe="sample-paper", grounded=True, options=_SMALL),
    Student(name="best", label="best at this size", recipe="sample", options=_SMALL, bars={"cifar10": 9.9}),
)


@pytest.fixture(scope="module")
def finished(
    image_tar: Path, text_file: Path, cifar10: str, teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The whole job on 96 images. Its commands are forked from the process that all tests fork from: whichever is the
    first of them says what that imports, and others need more than a job."""
    result_of(int)
    out = tmp_path_factory.mktemp("reproduce") / "tiny"
    sources = {"images": (str(image_tar),), "texts": (str(text_file),), "val": (cifar10,)}
    latency = ("--batch", "1", "--seconds", "0.02")
    run_all(commands(Scale(teacher=("--teacher", teacher), students=STUDENTS, latency=latency, **sources), out), out)
    return out


def test_end_to_end_the_job_ends_in_a_report(finished: Path, teacher: str, sample_teacher: str) -> None:
    report = write_report(finished, STUDENTS)
    assert report.missed[0].startswith("best at this size: cifar10 ")
    assert len(report.missed) == 1
    for part in ("as teacher says", "teacher in the loop", "cache-images", "bytes/row", "visually grounded", "seed 0",
                 "| ms per image, batch 1 |"):  # fmt: skip
        assert part in report.text
    assert (finished / "report.md").read_text().startswith("# dimefm: tiny")
    assert (finished / "report.png").stat().st_size > 20_000
    page = (finished / "report.html").read_text()
    for part in ("best at this size", "teacher in the loop", "texts.index", "run-paper", "pairs.zarr"):
        assert part in page
    for student in STUDENTS:
        (found,) = read_results(str(finished / "evaluations" / student.name))
        assert found.images == 200
        assert found.metrics["top1"] < 0.4
        assert f"| {student.label} " in report.text
    config = read_run(str(finished / "run-paper")).config
    assert (config["loss"]["vl"], config["loss"]["pvl"]) == (0.7, 0.3)  # type: ignore[index]
    assert config["text_mix"] == {"random": 0.0, "selected": 1.0, "retrieved": 0.0, "captions": 0.0}
    assert config["selection"]
    if teacher == sample_teacher:
        assert read_results(str(finished / "evaluations" / "teacher"))[0].metrics["top1"] > 0.4


def test_the_bill_is_what_the_rates_of_stage_1_and_the_steps_come_to(finished: Path) -> None:
    stages = {"cache-images": 8.0, "cache-texts": 2.0, "train paper": 20.0, "train best": 10.0}
    before = (finished / "stages.json").read_text()
    (finished / "stages.json").write_text(json.dumps(stages))
    text = write_report(finished, STUDENTS).text
    (finished / "stages.json").write_text(before)
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    seconds = {
        name: sum(commit.seconds for commit in Store(str(finished / name)).commits()) / cpus()
        for name in ("images.zarr", "texts.zarr")
    }
    image, text_one = seconds["images.zarr"] / 96, seconds["texts.zarr"] / 200
    texts = int(read_run(str(finished / "run-paper")).config["texts_per_step"])  # type: ignore[call-overload]
    online = {"the paper's losses": 20 + 12 * (16 * image + texts * text_one), "best at this size": 10 + 192 * image}
    for label, expected in online.items():
        assert float(rows[f"student: {label}"][1].replace(",", "")) == pytest.approx(expected, abs=0.51)
    assert rows["teacher, once"][0].strip() == "10"
    assert rows["all 3 together"][0].strip() == "40"


@pytest.mark.parametrize("stopped", ["cache-images", "train best"])
def test_a_stage_that_was_resumed_makes_no_saving(finished: Path, stopped: str) -> None:
    """Its time is not known, and none at all would make the cache look cheaper than it is."""
    stages = {"cache-images": 8.0, "cache-texts": 2.0, "train paper": 20.0, "train best": 10.0, stopped: None}
    before = (finished / "stages.json").read_text()
    (finished / "stages.json").write_text(json.dumps(stages))
    text = write_report(finished, STUDENTS).text
    (finished / "stages.json").write_text(before)
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    name = "teacher, once" if stopped == "cache-images" else "student: best at this size"
    assert [cell.strip() for cell in rows[name][:1]] == ["resumed"]
    whole, _, saving, _ = (cell.strip() for cell in rows["all 3 together"])
    assert (whole, saving) == ("resumed", "")


def test_the_report_is_of_zero_shot_whatever_else_was_measured(finished: Path) -> None:
    file = finished / "evaluations" / "teacher" / "results.jsonl"
    before, expected = file.read_text(), write_report(finished, STUDENTS).text
    (zero_shot,) = read_results(str(file))
    probe = replace(zero_shot, protocol="linear-probe/honest", metrics=dict.fromkeys(zero_shot.metrics, 1.0))
    file.write_text(before + json.dumps(probe.to_json()) + "\n")
    try:
        assert write_report(finished, STUDENTS).text == expected
    finally:
        file.write_text(before)


def test_every_line_before_a_stage_says_how_far_the_whole_job_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stages, "run_stage", lambda words: clock.__setitem__(0, clock[0] + 20) or 0)
    run_all([("a", ["info"]), ("b", ["info"]), ("c", ["info"])], tmp_path, {"a": 10.0, "b": 60.0, "c": 5.0})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert said == [
        "[1 of 3] a: 0s so far, about 1m15s left of all",
        "[2 of 3] b: 20s so far, about 2m10s left of all",
        "[3 of 3] c: 40s so far, about 3s left of all",
    ]
    assert json.loads((tmp_path / "stages.json").read_text()) == {"a": 20, "b": 20, "c": 20}


def test_a_command_that_fails_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(DimefmError, match="info failed with exit code 2"):
        run_all([("info", ["info", "--no-such-option"]), ("never", [])], tmp_path)
    assert json.loads((tmp_path / "stages.json").read_text()) == {"info": None}


def test_a_stage_that_was_stopped_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "run_stage", lambda words: 130)
    with pytest.raises(StoppedError, match=r"stopped in training(?s:.*)goes on from there") as caught:
        run_all([("training", ["train-student"]), ("never", [])], tmp_path)
    assert caught.value.signal == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_the_stage_and_then_the_job(number: signal.Signals, to_all: bool, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of the job, SIGTERM the first alone, which hands it on."""
    words = [sys.executable, "-m", "dimefm.reproduce", "--scale", "smoke", "--out", str(tmp_path / "out")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while not (lock := tmp_path / "out" / "images.zarr" / ".lock").exists() or not lock.read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(process.pid, number)
    code = process.wait(120)
    said = (tmp_path / "log").read_text()
    assert code == 128 + number, said
    assert "Stopped: the job was stopped in cache-images" in said
    with writing(str(tmp_path / "out" / "images.zarr")):
        pass  # nobody holds it any more
