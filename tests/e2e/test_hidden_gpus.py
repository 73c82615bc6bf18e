"""On a machine with a GPU the tests see none, except for those that are about it."""

import os
from pathlib import Path

import pytest

from tests.conftest import wants_gpus
from tests.processes import result_of

TESTS = """
import os, subprocess, sys
import pytest

def seen():
    say = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    below = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True).stdout.strip()
    assert below == repr(os.environ["CUDA_VISIBLE_DEVICES"])
    return os.environ["CUDA_VISIBLE_DEVICES"]

@pytest.mark.gpu
def test_of_a_gpu():
    assert seen() == "0"

def test_of_something_else():
    assert seen() == ""
"""


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("not slow and gpu", True),
        ("(gpu)", True),
        ("slow or gpu", True),
        ("slow", False),
        ("not gpu", False),
        ("not slow and not gpu", False),
        ("not gpus", False),
    ],
)
def test_the_marks_that_are_chosen_say_whether_gpus_are_wanted(expression: str, expected: bool) -> None:
    assert wants_gpus(expression) == expected


def run(words: list[str]) -> int:
    """pytest with our conftest, on a machine with a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    return int(pytest.main(["-p", "tests.conftest", "-p", "no:cacheprovider", "-q", *words]))


@pytest.mark.parametrize(
    "words", [["-m", "gpu"], ["-m", "not gpu"], pytest.param(["-k", "something_else"], marks=pytest.mark.slow)]
)
def test_only_tests_of_a_gpu_see_one_and_so_do_their_processes(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "test_seeing.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    assert result_of(run, ["--rootdir", str(tmp_path), str(tmp_path), *words]) == 0
