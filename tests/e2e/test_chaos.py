"""The benchmark that strikes commands: a few of its rounds, so that it goes on working."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="faults.c needs Linux and a compiler")
def test_commands_that_are_struck_give_the_same_bytes_when_run_again() -> None:
    words = [sys.executable, "-m", "benchmarks", "chaos", "--rounds", "8", "--only", "retrieve"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| retrieve")]
    assert rows
    assert all("the same" in row for row in rows)
