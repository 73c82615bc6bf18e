"""--quiet: no progress and no notes, but every result, problem and error."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dimefm.cli import cli
from dimefm.system import notes
from tests.making import make_jpeg, write_tar
from tests.stores import random_store

SILENT = {"card", "sets", "compare", "submission", "doctor", "info"}  # they show neither


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_every_command_that_works_for_a_while_has_the_option() -> None:
    has = {name for name, command in cli.commands.items() if any("--quiet" in one.opts for one in command.params)}
    assert set(cli.commands) - has - {"recipes"} == SILENT


def test_notes_and_progress_are_muted_and_the_rest_is_not(tmp_path: Path, teacher_name: str) -> None:
    folder = tmp_path / "in"
    write_tar(folder / "0.tar", {"a.jpg": make_jpeg(seed=1), "b.jpg": b"no image"})
    (folder / "other.txt").write_text("not used")
    words = (
        "cache-images",
        folder,
        "--teacher",
        teacher_name,
        "--device",
        "cpu",
        "--workers",
        "1",
        "--shard-rows",
        "1",
    )
    loud = run(*words, "--out", tmp_path / "loud.zarr")
    quiet = run(*words, "--out", tmp_path / "quiet.zarr", "--quiet")
    assert loud.exit_code == quiet.exit_code == 0, loud.output
    assert "skipped: " in loud.stderr
    assert "encoding: " in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.replace("quiet", "loud").splitlines()[0] == loud.stdout.splitlines()[0]
    assert "skipped" in quiet.stdout  # the result says it


def test_errors_stay_and_the_next_command_is_not_muted(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "texts.zarr", rows=32, shard_rows=16)
    result = run("verify", tmp_path / "nothing.zarr", "-q")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert not notes.are_muted()
    assert run("export-embeddings", store.path, "--out", tmp_path / "out").stderr != ""
    assert run("export-embeddings", store.path, "--out", tmp_path / "again", "-q").stderr == ""


def test_a_muted_note_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    notes.note("shown\x1b[31m")
    notes.mute()
    try:
        notes.note("not shown")
    finally:
        notes.mute(False)
    assert capsys.readouterr().err == "shown\\x1b[31m\n"
