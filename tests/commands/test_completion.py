"""Completion in a shell: commands, options, choices, models; files where a path is due. It imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from dimefm.cli import cli
from dimefm.commands.completion import _PLACES


def offered(*words: str) -> list[str]:
    """What is offered for the last word; files are `file`."""
    complete = BashComplete(cli, {}, "dimefm", "_DIMEFM_COMPLETE")
    found = complete.get_completions(list(words[:-1]), words[-1])
    return [item.type if item.type != "plain" else item.value for item in found]


def test_commands_options_and_choices() -> None:
    assert offered("tr") == ["train-student"]
    assert offered("cache-images", "--resize") == ["--resize-mode"]
    assert offered("select-texts", "--by", "") == ["hits", "similarity", "random"]


def test_models() -> None:
    assert offered("cache-images", "--teacher", "ViT-B-32-q") == ["ViT-B-32-quickgelu"]
    assert offered("cache-images", "--teacher", "local") == ["local-dir:"]
    assert "resnet18" in offered("train-student", "--student", "resnet1")


@pytest.mark.parametrize(
    "words",
    [
        ("cache-images", ""),
        ("cache-images", "x", "--out", "im"),
        ("cache-images", "--pretrained", "w"),
        ("info", "im"),
        ("report", "ru"),
        ("watch", "ru"),
        ("evaluate", "st"),
        ("evaluate", "student", "se"),
        ("predict", "student", "ph"),
        ("predict", "student", "--classes-from", "cl"),
        ("train-student", "--images", ""),
        ("export", "ru"),
        ("search", "texts.zarr", "--image", ""),
    ],
)
def test_files(words: tuple[str, ...]) -> None:
    assert offered(*words) == ["file"]


def test_every_place_is_one_of_a_command() -> None:
    assert {one.name for command in cli.commands.values() for one in command.params} >= _PLACES


def test_a_real_bash_completes_without_torch(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "dimefm").write_text(f'#!/bin/sh\nexec {sys.executable} -X importtime -m dimefm "$@" 2>imports\n')
    (tmp_path / "dimefm").chmod(0o755)
    script = (
        "source <(_DIMEFM_COMPLETE=bash_source dimefm); COMP_WORDS=(dimefm inf); COMP_CWORD=1; "
        '_dimefm_completion dimefm; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "info\n", done.stderr
    imported = (tmp_path / "imports").read_text()
    assert "dimefm.cli" in imported
    assert "torch" not in imported
