"""Whatever a command writes: at a URL it is written there, or refused; nowhere is a local folder made of the URL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dimefm.cli import cli
from dimefm.reproduce import stages
from dimefm.store.embedding_store import Store
from dimefm.system import storage

pytest_plugins = ["tests.s3"]

ANYWHERE = {
    "cache-images": "images.zarr", "cache-texts": "texts.zarr", "import-embeddings": "imported.zarr",
    "retrieve": "pairs.zarr", "select-texts": "t.selection",
    "select-images": "i.selection", "compare": "table.md", "submission": "s.zip",
}  # fmt: skip
LOCAL = {
    "train-student": "run", "export": "clip", "export-embeddings": "embeddings", "build-index": "t.index",
    "evaluate": "evaluations", "convert-checkpoint": "converted", "latency": "latency.json",
    "leaks": "l.selection", "report": "page.html",
}  # fmt: skip


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture(scope="module")
def words(
    tiny_run: list[str],
    image_store: Store,
    text_store: Store,
    image_tar: Path,
    text_file: Path,
    teacher_name: str,
    cifar10: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """Of each command, all but its --out; their inputs are local."""
    here = tmp_path_factory.mktemp("here")
    small = ["--teacher", teacher_name, "--device", "cpu", "--shard-rows", "64"]
    known = ["--data", str(Path(cifar10).parent), "--sets", "cifar10", "--predictions", "--device", "cpu"]
    found = {
        "cache-images": ["cache-images", str(image_tar), *small],
        "cache-texts": ["cache-texts", str(text_file), *small],
        "retrieve": ["retrieve", image_store.path, "--texts", text_store.path, "--top-k", "2", "--device", "cpu"],
        "select-texts": ["select-texts", f"{here}/pairs.zarr", "--by", "similarity", "--size", "9", "--device", "cpu"],
        "select-images": ["select-images", image_store.path, "--dedup", "0.9", "--size", "9", "--device", "cpu"],
        "train-student": tiny_run,
        "leaks": ["leaks", image_store.path, cifar10, "--device", "cpu"],
        "report": ["report", image_store.path],
        "export": ["export", f"{here}/run"],
        "export-embeddings": ["export-embeddings", image_store.path],
        "import-embeddings": ["import-embeddings", f"{here}/embeddings", "--kind", "image", "--teacher", teacher_name],
        "build-index": ["build-index", text_store.path, "--factory", "Flat"],
        "evaluate": ["evaluate", f"{here}/clip", *known],
        "compare": ["compare", f"{here}/evaluations/clip"],
        "submission": ["submission", f"{here}/evaluations/clip"],
        "latency": ["latency", f"{here}/clip", "--device", "cpu"],
        "convert-checkpoint": ["convert-checkpoint", f"{here}/model.pth", "--teacher", teacher_name],
    }
    Path(here, "model.pth").touch()
    for command in ("retrieve", "train-student", "export", "export-embeddings", "evaluate"):
        result = run(*found[command], "--out", f"{here}/{(ANYWHERE | LOCAL)[command]}")
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return found


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_command_with_an_output_is_below() -> None:
    found = {name for name, command in cli.commands.items() if any(p.name == "out" for p in command.params)}
    assert found == {*ANYWHERE, *LOCAL}


@pytest.mark.parametrize("command", ANYWHERE)
def test_what_may_be_anywhere_is_written_to_a_url_as_to_a_disk(
    s3: str, words: dict[str, list[str]], tmp_path: Path, command: str
) -> None:
    name = ANYWHERE[command]
    result = run(*words[command], "--out", f"{s3}/{name}")
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    assert list(tmp_path.iterdir()) == []
    assert run(*words[command], "--out", name).exit_code == 0
    if (tmp_path / name).is_file():
        assert storage.exists(f"{s3}/{name}")
    else:
        assert storage.tree(f"{s3}/{name}") == storage.tree(str(tmp_path / name))


def test_the_umask_decides_who_may_read_what_is_written(words: dict[str, list[str]], tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        for command in ("build-index", "train-student", "export", "export-embeddings", "evaluate"):
            assert run(*words[command], "--out", LOCAL[command]).exit_code == 0
    finally:
        os.umask(mask)
    made = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o750}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o640}


@pytest.mark.parametrize("command", LOCAL)
def test_what_must_be_local_is_refused_at_a_url(words: dict[str, list[str]], tmp_path: Path, command: str) -> None:
    result = run(*words[command], "--out", "s3://bucket/out")
    assert result.exit_code == 1, f"{result.output}{result.exception!r}"
    assert "Error: s3://bucket/out: " in result.output
    assert "must be a local path\n  remedy: give a local path and copy it up afterwards" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_whole_job_is_refused_at_a_url(tmp_path: Path) -> None:
    result = CliRunner().invoke(stages.main, ["--scale", "smoke", "--out", "s3://bucket/out"])
    assert result.exit_code == 1
    assert "Error: s3://bucket/out: the folder of a whole job must be a local path" in result.output
    assert list(tmp_path.iterdir()) == []
