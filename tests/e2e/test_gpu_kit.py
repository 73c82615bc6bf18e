"""The kit for a day with a GPU, in small on the CPU: every step comes to its end without ray or faiss, what goes wrong
in one is kept and is not the next one's, and the files are good at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import COMMANDS, benchmarks
from benchmarks.gpu import running
from benchmarks.gpu.forked import together
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.results import Results, Step
from benchmarks.gpu.sizes import SMALL
from benchmarks.gpu.wheels import NAMES, pinned, wheels

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without_ray_and_faiss(tmp_path: Path) -> dict[str, str]:
    """An environment in which neither can be imported, as on the machines that the kit is for."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in ("ray", "faiss"):
        (folder / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n')
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def kit(out: Path, environment: dict[str, str], *words: str) -> tuple[dict[str, Any], str]:
    """Run it on the CPU; results.json, and what it printed."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(out), "--device", "cpu", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads((out / "results.json").read_text())
    assert done.returncode == 0, f"{done.stdout}\n{(out / 'results.md').read_text()}\n{done.stderr}"
    return found, done.stdout


def whats(step: dict[str, Any]) -> set[str]:
    return {line["what"] for line in step["lines"]}


@pytest.mark.slow
def test_a_step_runs_without_ray_and_faiss(tmp_path: Path, without_ray_and_faiss: dict[str, str]) -> None:
    found, printed = kit(tmp_path / "out", without_ray_and_faiss, "--minutes", "4", "--only", "g")
    (step,) = found["steps"]
    assert (step["letter"], step["state"], step["passed"]) == ("g", "done", True)
    assert "## Bars" in printed


@pytest.mark.slow
def test_steps_run_without_ray_and_faiss(tmp_path: Path, without_ray_and_faiss: dict[str, str]) -> None:
    """All but the marked tests and the quality, which take long. Far more minutes than they need: a slow machine is no
    error, but the time to compile is not there."""
    found, printed = kit(tmp_path / "out", without_ray_and_faiss, "--minutes", "4", "--only", "a,b,c,d,e,f,g,i")
    steps = {step["letter"]: step for step in found["steps"]}
    assert list(steps) == list("abcdefgi")
    assert all(step["state"] == "done" and step["passed"] for step in steps.values())
    assert {"least cosine", "relative error", "same bytes", "canary", "resumed"} <= words_of(whats(steps["b"]))
    assert {"stage 1 against the bare forward, decoding too", "decoding on 1 threads"} <= whats(steps["c"])
    assert any("nvJPEG" in what for what in whats(steps["c"]))
    assert "host memory, peak" in whats(steps["e"])
    assert "cost of T = 64 against T = B" in whats(steps["f"])
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert rates.keys() == {
        "card", "date", "command", "teacher_images_per_second", "teacher_texts_per_second", "exact_scores_per_second",
        "student_images_per_second", "online_student_images_per_second",
    }  # fmt: skip
    assert "## Bars" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "rates.json", "log.txt"}


def words_of(names: set[str]) -> set[str]:
    """Those of a few phrases that occur in the names of measurements."""
    phrases = ("least cosine", "relative error", "same bytes", "canary", "resumed")
    return {phrase for phrase in phrases if any(phrase in name for name in names)}


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_whole_kit(tmp_path: Path, without_ray_and_faiss: dict[str, str]) -> None:
    found, _ = kit(tmp_path / "out", without_ray_and_faiss, "--minutes", "20")
    assert [step["letter"] for step in found["steps"]] == list("abtcdefgij")
    assert found["passed"]
    steps = {step["letter"]: step for step in found["steps"]}
    assert {"compiled: least cosine to eager", "compiling"} <= whats(steps["c"])
    assert "tests marked gpu: failures" in whats(steps["t"])
    assert {"zero-shot top-1 on cifar10", "zero-shot top-1 on caltech101"} <= whats(steps["j"])


# -- steps that go wrong, each a function of this module --------------------------------------------------------------


def breaks(kit: Kit) -> None:
    kit.line("before", 1.0)

    def part(kit: Kit) -> None:
        raise ValueError("the first part broke")

    def other(kit: Kit) -> None:
        kit.line("after", 2.0)

    kit.each(part, other)


def is_wrong(kit: Kit) -> None:
    kit.check("a cosine", float("nan"), least=0.999)


def misses_a_bar(kit: Kit) -> None:
    kit.bar("a share", 0.5, least=0.95)
    kit.rate("teacher_images_per_second", 12.345)
    kit.remember("peak", 7.0)


def hangs(kit: Kit) -> None:
    kit.line("before", 1.0)
    time.sleep(600)


def dies(kit: Kit) -> None:
    kit.line("before", kit.known["peak"])
    os._exit(3)


def forks(kit: Kit) -> None:
    kit.line("sum", float(sum(together(kit, [partial(pow, 2, 3), partial(pow, 2, 4)]))))

    def fails(kit: Kit) -> None:
        together(kit, [partial(time.sleep, 600), partial(divmod, 1, 0)])

    def is_late(kit: Kit) -> None:
        together(kit, [partial(time.sleep, 600)], most=0.2)

    kit.each(fails, is_late)


def imports_ray(kit: Kit) -> None:
    sys.modules["ray"] = sys.modules["json"]


def run(function: Any, results: Results, tmp_path: Path, seconds: float = 60.0) -> Step:
    step = Step(function.__name__[0], function.__name__)
    running.run(
        f"{function.__module__}:{function.__name__}", step, results, device="cpu", sizes=SMALL, folder=tmp_path,
        log=tmp_path / "log.txt", until=time.monotonic() + seconds,
    )  # fmt: skip
    return step


@pytest.fixture
def new_forkserver() -> Iterator[None]:
    """The process that others are forked from is one for all tests of a process, and has imported what those want."""
    stop = forkserver._forkserver._stop  # type: ignore[attr-defined]
    stop()
    yield
    stop()


@pytest.mark.slow
@pytest.mark.usefixtures("new_forkserver")
def test_what_goes_wrong_in_a_step_is_kept_and_not_the_next_ones(tmp_path: Path) -> None:
    running.prepare()
    results = Results(tmp_path / "out", "the command", 9)
    broken, missed = run(breaks, results, tmp_path), run(misses_a_bar, results, tmp_path)
    wrong, strange, dead = (run(function, results, tmp_path) for function in (is_wrong, imports_ray, dies))
    hung, forked = run(hangs, results, tmp_path, seconds=10), run(forks, results, tmp_path)
    steps = (broken, missed, wrong, strange, dead, hung, forked)
    assert [step.passed for step in steps] == [False, True, *5 * [False]]
    assert broken.state == "failed"
    assert "the first part broke" in broken.traceback
    assert [line.what for line in broken.lines[:2]] == ["before", "after"]
    assert missed.lines[0].verdict == "MISSED"
    assert (wrong.state, wrong.lines[0].verdict, wrong.lines[0].value) == ("done", "WRONG", "nan")
    assert strange.lines[-1].verdict == "WRONG"
    assert (dead.state, dead.lines[0].value) == ("failed", 7.0)
    assert (hung.state, hung.lines[0].what) == ("stopped", "before")
    assert "in hangs" in (tmp_path / "log.txt").read_text(), "where it hung"
    assert (forked.state, forked.lines[0].value, forked.seconds < 30) == ("failed", 24.0, True)
    assert "ZeroDivisionError" in forked.traceback
    assert "1 of 1 were not done in 0 s" in forked.traceback
    assert not results.passed
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [step["passed"] for step in whole["steps"]] == [False, True, *5 * [False]]
    assert json.loads((tmp_path / "out" / "rates.json").read_text())["teacher_images_per_second"] == 12.35
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.index("## Wrong") < text.index("## Bars") < text.index("the first part broke")


# -- what surrounds it ------------------------------------------------------------------------------------------------


def test_benchmarks_import_one_command_alone() -> None:
    code = "import sys, benchmarks.__main__\nprint([name for name in ('torch', 'ray', 'faiss') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_is_a_command(name: str) -> None:
    result = CliRunner().invoke(benchmarks, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_steps_that_are_not_there_are_named() -> None:
    result = CliRunner().invoke(benchmarks, ["gpu", "--out", "nowhere", "--only", "a,x"])
    assert result.exit_code == 2
    assert "no step x; there are a, b" in result.output


def test_the_wheels_are_of_the_versions_that_are_pinned(tmp_path: Path) -> None:
    versions = pinned(ROOT / "constraints.txt")
    assert list(versions) == list(NAMES)
    for name in ("google_crc32c-1.9.0-cp312-cp312-manylinux2014_x86_64.whl", "zarr-0.1-py3-none-any.whl"):
        (tmp_path / name).touch()
    found = wheels({"google-crc32c": "1.9.0", "zarr": versions["zarr"]}, tmp_path)
    assert [path and path.name for path in found.values()] == [
        "google_crc32c-1.9.0-cp312-cp312-manylinux2014_x86_64.whl",
        None,
    ]
    (tmp_path / "constraints.txt").write_text("zarr==3.1.6\n")
    with pytest.raises(ValueError, match="has no version of numcodecs, donfig"):
        pinned(tmp_path / "constraints.txt")
