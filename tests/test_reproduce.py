"""`make reproduce`: its commands, its forecast, its report. The whole of it runs in test_end_to_end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.errors import DimefmError
from dimefm.evaluation.results import read_results
from dimefm.report import write_report
from dimefm.reproduce import Scale, commands, main, run_all, sample_scale, smoke_scale
from tests.processes import Command
from tests.training import STUDENT


@pytest.mark.parametrize("scale", [smoke_scale(), sample_scale()])
def test_every_stage_is_a_command_with_options_that_exist(scale: object, tmp_path: Path) -> None:
    stages = commands(scale, tmp_path)  # type: ignore[arg-type]
    assert [words[0] for _, words in stages] == [
        "cache-images", "cache-texts", "cache-texts", "build-index", "retrieve", "select-texts", "train-student",
        "export", "evaluate", "evaluate",
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
    assert "5,311" in result.output
    assert "counted" in result.output


def test_the_papers_job_asks_for_its_data() -> None:
    result = CliRunner().invoke(main, ["--scale", "paper"])
    assert result.exit_code == 2
    assert "needs --images, --texts and --val" in result.output


@pytest.fixture(scope="module", params=["tiny", pytest.param("sample", marks=pytest.mark.slow)])
def teacher(request: pytest.FixtureRequest, teacher_name: str, sample_teacher: str) -> str:
    """One whose numbers mean nothing, which is enough for the job to run, and the sample's."""
    return sample_teacher if request.param == "sample" else teacher_name


@pytest.fixture(scope="module")
def finished(
    image_tar: Path, text_file: Path, cifar10: str, teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The whole job by its commands, on 96 images, as `make reproduce` runs them; but each process is forked."""
    out = tmp_path_factory.mktemp("reproduce") / "tiny"
    scale = Scale(
        teacher=("--teacher", teacher),
        images=(str(image_tar),),
        texts=(str(text_file),),
        val=(cifar10,),
        recipe="sample",
        train=(
            *("--student", STUDENT, "--image-size", "32", "--batch-size", "16", "--epochs", "2", "--log-every", "2"),
            *("--precision", "fp32"),
        ),
        bars={"cifar10": 9.9},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.reproduce.subprocess.run", forked)
        run_all(commands(scale, out), out)
    return out


def forked(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    assert command[:3] == [sys.executable, "-m", "dimefm"]
    return subprocess.CompletedProcess(command, 0, Command(command[3:]).finish())


def test_end_to_end_the_job_ends_in_a_report(finished: Path, teacher: str, sample_teacher: str) -> None:
    report = write_report(finished, {"cifar10": 9.9})
    assert report.missed[0].startswith("cifar10 ")
    for part in ("agreement", "cache-images", "bytes/row", "visually grounded", "seed 0"):
        assert part in report.text
    assert (finished / "report.md").read_text().startswith("# dimefm: tiny")
    assert (finished / "report.png").stat().st_size > 20_000
    small, large = (read_results(str(finished / "evaluations" / name))[0] for name in ("student", "teacher"))
    assert small.images == large.images == 200
    assert write_report(finished, {"cifar10": 0.0}).missed == []
    if teacher == sample_teacher:
        assert large.metrics["top1"] > 0.4 > small.metrics["top1"]
        assert write_report(finished, {"cifar10": 0.1}).missed == []


def test_python_dash_m_is_the_command(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_all([("info", ["info", str(finished / "pairs.zarr")])], tmp_path)
    output = capfd.readouterr().out
    assert "the nearest 16 sentences each" in output
    assert "hits" in output
    assert json.loads((tmp_path / "stages.json").read_text())["info"] > 0


def test_a_command_that_fails_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(DimefmError, match="info failed with exit code 2"):
        run_all([("info", ["info", "--no-such-option"]), ("never", [])], tmp_path)
    assert json.loads((tmp_path / "stages.json").read_text()) == {"info": None}
