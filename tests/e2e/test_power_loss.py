"""What a loss of power leaves: a document that says that work is done is there only with all that it vouches for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.store.embedding_store import Store
from tests.stores import random_store

DOCUMENTS = (
    "zarr.json", "commits/*.json", "hits.json", "index.json", "build/*.json", "selection.json",
    "run.json", "checkpoints/*.json",
)  # fmt: skip
"""By their places, what says that something is done. Whole folders are renamed too."""


class PowerLoss:
    """What would be left of the files below `root` if the power went now: those that were flushed after they were
    written last, with their names, if the folders that hold them were flushed after they got them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self.checked = root, list[str]()
        self._files: dict[int, tuple[int, int]] = {}  # by inode: time and size when it was flushed
        self._names: dict[int, dict[str, int]] = {}  # of a folder: the inodes of the names in it
        self.keep()
        fsync, replace, rename = os.fsync, Path.replace, Path.rename

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            self._keep(Path(f"/proc/self/fd/{descriptor}").resolve())

        def moving(move: Callable[..., Any]) -> Callable[..., Any]:
            def moved(path: Path, target: Path) -> Any:
                self.check(Path(target), path)
                return move(path, target)

            return moved

        monkeypatch.setattr("os.fsync", flush)
        monkeypatch.setattr(Path, "replace", moving(replace))
        monkeypatch.setattr(Path, "rename", moving(rename))

    def keep(self) -> None:
        """All that is there now is on the disk."""
        for path in [self._root, *self._root.rglob("*")]:
            self._keep(path)

    def check(self, target: Path, source: Path) -> None:
        """Before `source` gets the name `target`, if that says that something is done."""
        if self._root not in target.parents or source.name.endswith(".partial"):  # zarr's, which we flush
            return
        kinds = [pattern for pattern in DOCUMENTS if target.match(pattern)] + ["folder"] * source.is_dir()
        for kind in kinds:
            assert self.lost(but=(source, target)) == []
            self.checked.append(kind)

    def lost(self, but: tuple[Path, ...] = ()) -> list[str]:
        """The files and folders that a loss of power would cost; `but` those whose names do not yet matter."""
        found = []
        for path in self._root.rglob("*"):
            if path.name == ".lock" or "tfevents" in path.name or path.name.endswith(".partial"):
                continue
            state, name = path.stat(), str(path.relative_to(self._root))
            names = self._names.get(path.parent.stat().st_ino, {})
            if path not in but and names.get(path.name) != state.st_ino:
                found.append(f"{name}: its folder was not flushed since")
            if (
                path.is_file()
                and path not in but[1:]
                and self._files.get(state.st_ino) != (state.st_mtime_ns, state.st_size)
            ):
                found.append(f"{name}: it was not flushed since it was written")
        return found

    def names_of(self, folder: Path) -> set[str]:
        """Of the files that are in a folder on the disk."""
        return set(self._names[folder.stat().st_ino])

    def _keep(self, path: Path) -> None:
        if path == self._root or self._root in path.parents:
            state = path.stat()
            if path.is_dir():
                self._names[state.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                self._files[state.st_ino] = (state.st_mtime_ns, state.st_size)


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PowerLoss:
    (tmp_path / "disk").mkdir()
    return PowerLoss(tmp_path / "disk", monkeypatch)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Within folders that are not there yet, whose names must be on the disk too."""
    return tmp_path / "disk" / "new" / "newer" / "out"


def do(power: PowerLoss, *words: str) -> set[str]:
    """Run a command; the kinds of documents that it wrote, each in time."""
    power.checked.clear()
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    assert power.lost() == []
    return set(power.checked)


def test_a_commit_is_gone_from_the_disk_before_its_shard_is_written_again(power: PowerLoss, tmp_path: Path) -> None:
    """Else the old one could come back, and vouch for what is new."""
    store, _ = random_store(tmp_path / "disk" / "s.zarr", rows=32, shard_rows=16)
    arrays, seen = store.shard_arrays(0), list[set[str]]()

    def writing(*_: object) -> None:
        seen.append(power.names_of(tmp_path / "disk" / "s.zarr" / "commits"))
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.store.stored_array.write_rows", writing)
        with pytest.raises(ZeroDivisionError):
            store.write_shard(0, arrays, (), device="cpu", seconds=0)
    assert seen == [{"000001.json"}]


def test_a_cache(power: PowerLoss, out: Path, image_tar: Path, teacher_name: str) -> None:
    more = ["--shard-rows", "32", "--pixels", "64", "--views", "2", "--workers", "1", "--device", "cpu"]
    found = do(power, "cache-images", str(image_tar), "--out", str(out), "--teacher", teacher_name, *more)
    assert found == {"zarr.json", "commits/*.json"}
    assert len(power.checked) == 4


def test_an_index_pairs_and_a_selection(
    power: PowerLoss, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.retrieval.choose_index._PART_ROWS", (128, 128))
    texts, _ = random_store(tmp_path / "t.zarr", rows=600, shard_rows=128, kind="text")
    images, _ = random_store(tmp_path / "i.zarr", rows=96, shard_rows=32, seed=1)
    words = ["build-index", texts.path, "--out", f"{out}.index", "--factory", "IVF16,SQ8", "--recall", "0.5"]
    assert do(power, *words) == {"build/*.json", "index.json"}
    words = ["retrieve", images.path, "--texts", texts.path, "--top-k", "4", "--device", "cpu", "--out", f"{out}.zarr"]
    assert do(power, *words) == {"zarr.json", "commits/*.json", "hits.json"}
    words = ["select-texts", f"{out}.zarr", "--by", "similarity", "--size", "50", "--device", "cpu"]
    assert do(power, *words, "--out", f"{out}.selection") == {"selection.json"}


def test_a_run_its_export_and_an_evaluation(
    power: PowerLoss, out: Path, tiny_run: list[str], teacher_name: str, cifar10: str
) -> None:
    assert do(power, *tiny_run, "--out", str(out)) == {"run.json", "checkpoints/*.json"}
    assert do(power, "export", str(out), "--out", f"{out}-clip") == {"folder"}
    words = ["evaluate", f"{out}-clip", cifar10, "--out", f"{out}-evaluations", "--predictions", "--device", "cpu"]
    assert do(power, *words) == {"zarr.json", "commits/*.json"}


def test_an_import_and_an_export_of_embeddings(
    power: PowerLoss, out: Path, image_store: Store, teacher_name: str
) -> None:
    assert do(power, "export-embeddings", image_store.path, "--out", f"{out}-embeddings") == {"folder"}
    words = ["import-embeddings", f"{out}-embeddings", "--kind", "image", "--teacher", teacher_name, "--check", "0"]
    assert do(power, *words, "--out", f"{out}.zarr") == {"zarr.json", "commits/*.json"}
