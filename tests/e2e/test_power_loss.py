"""What a loss of power leaves: a document that says that work is done is there only with all that it vouches for.

The first tests look at each document as it gets its name. The last ones cut the power at any moment: of each disk that
could be left, the product's own commands must find nothing damaged, go on, and end with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.inspection.verify import VerifyConfig, verify
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
        self._folders = set[int]()  # inodes that are folders
        self._bytes: dict[int, bytes] = {}  # of a file, when it was flushed
        self._open: dict[int, int] = {}  # a descriptor of each inode, which keeps its number from being used again
        self.disks: list[Disk] | None = None  # to be kept: what a loss of power could have left at any moment
        self.keep()
        fsync, replace, rename, unlink = os.fsync, Path.replace, Path.rename, os.unlink

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            self._keep(Path(f"/proc/self/fd/{descriptor}").resolve())
            self._remember()

        def moving(move: Callable[..., Any]) -> Callable[..., Any]:
            def moved(path: Path, target: Path) -> Any:
                self.check(Path(target), path)
                result = move(path, target)
                self._remember()
                return result

            return moved

        def remove(*words: Any, **more: Any) -> None:
            unlink(*words, **more)
            self._remember()

        monkeypatch.setattr("os.fsync", flush)
        monkeypatch.setattr("os.unlink", remove)
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
                inside = list(os.scandir(path))
                self._names[state.st_ino] = {entry.name: entry.inode() for entry in inside}
                self._folders |= {entry.inode() for entry in inside if entry.is_dir(follow_symlinks=False)}
            else:
                self._files[state.st_ino] = (state.st_mtime_ns, state.st_size)
                self._bytes[state.st_ino] = path.read_bytes()
            if state.st_ino not in self._open:
                self._open[state.st_ino] = os.open(path, os.O_RDONLY)

    def _remember(self) -> None:
        """What would be left now in three cases: of the names, only those that were flushed are there; those of them
        that have been removed since are not; all are as they are now. Of files there is what was flushed."""
        if self.disks is None:
            return
        for kind in ("flushed", "removed", "now"):
            disk: Disk = {}
            self._left(self._root, self._root.stat().st_ino, "", kind, disk)
            if disk not in self.disks:
                self.disks.append(disk)

    def _left(self, path: Path, folder: int, name: str, kind: str, disk: Disk) -> None:
        """Add what is left of a folder, by its inode; it is at `path` now if it is there at all."""
        try:
            here = {entry.name: entry.inode() for entry in os.scandir(path)} if path.stat().st_ino == folder else {}
        except OSError:
            here = {}
        names = here if kind == "now" else self._names.get(folder, {})
        for entry, inode in names.items():
            inner = f"{name}/{entry}".lstrip("/")
            if inode in self._folders or (kind == "now" and (path / entry).is_dir()):
                if kind != "removed" or entry in here:
                    disk[inner] = None
                    self._left(path / entry, inode, inner, kind, disk)
            elif kind != "removed" or entry in here:
                disk[inner] = self._bytes.get(inode, b"")

    def end(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


Disk = dict[str, bytes | None]
"""By the places of files and folders (None) below the root, what is in them."""


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerLoss]:
    (tmp_path / "disk").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        found = PowerLoss(tmp_path / "disk", patch)
        yield found
    found.end()


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


def test_views_that_are_added(power: PowerLoss, out: Path, image_tar: Path, teacher_name: str) -> None:
    more = ["--shard-rows", "48", "--workers", "1", "--device", "cpu", "--views"]
    words = ["cache-images", str(image_tar), "--out", str(out), "--teacher", teacher_name, *more]
    do(power, *words, "1")
    assert do(power, *words, "2") == {"zarr.json", "commits/*.json"}
    assert len(power.checked) == 3


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


# -- the power goes at any moment -------------------------------------------------------------------------------------


def work(folder: Path) -> dict[str, bytes]:
    """The files below a folder that hold what was worked out, without documents, which have times in them."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    kinds = (".parquet", ".tar", ".faiss", ".safetensors", ".npy", ".bin")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if path.suffix in kinds or "c" in path.relative_to(folder).parts
    }


class AnyMoment:
    """Does a command once, and then from what may be left of it at other moments."""

    def __init__(self, power: PowerLoss, folder: Path) -> None:
        self._power, self._folder, self._disk = power, folder, folder / "disk"

    def lose(self, *words: str, most: int) -> None:
        """At `most` moments, spread over the command."""
        self._power.disks = []
        do(self._power, *words)
        disks, self._power.disks = self._power.disks, None
        whole = work(self._disk)
        assert whole
        chosen = disks[:: -(-len(disks) // most)]
        for number, disk in enumerate(chosen):
            place = self._folder / f"disk-{number}"
            for name, data in {"": None, **disk}.items():
                if data is None:
                    (place / name).mkdir(parents=True, exist_ok=True)
                else:
                    (place / name).write_bytes(data)
            for path in place.rglob("zarr.json"):
                if (path.parent / "commits").is_dir() and b"dimefm" in path.read_bytes():
                    found = verify(VerifyConfig(store=str(path.parent)))
                    assert (found.bad, found.faults) == ({}, []), f"{number} of {len(chosen)}"
            result = CliRunner().invoke(cli, [word.replace(str(self._disk), str(place)) for word in words])
            there = "exists" in result.output and words[0].startswith("export")  # it was finished
            assert result.exit_code == 0 or there, f"{number} of {len(chosen)}: {result.output}{result.exception!r}"
            assert work(place) == whole, number


@pytest.fixture
def any_moment(power: PowerLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyMoment:
    """What died is gone on with in this process, although an image could have been the cause."""
    monkeypatch.setattr("pipeline.cache_job.running", lambda _: nullcontext(False))
    return AnyMoment(power, tmp_path)


def test_power_may_go_at_any_moment_of_a_cache(
    any_moment: AnyMoment, out: Path, image_tar: Path, teacher_name: str
) -> None:
    more = ["--shard-rows", "48", "--teacher", teacher_name, "--workers", "1", "--device", "cpu", "--threads", "1"]
    any_moment.lose("cache-images", str(image_tar), "--out", f"{out}.zarr", *more, most=2)
