"""SIGKILL at several points, and the same command again: the same store, and on CPU the same student.

Each command is a process of its own, with a real local Ray; nothing is simulated.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.clip import Clip, load_clip
from dimefm.store import Store
from pipeline.plan import PlanRequest, open_or_plan
from pipeline.shard import encode_shard, retry_shard
from pipeline.verify import VerifyConfig, verify
from tests.making import make_jpeg
from tests.processes import FORKING, Command, processes
from tests.training import same, weights

pytestmark = pytest.mark.slow


def data_files(store: Path) -> dict[str, bytes]:
    """What must not differ, byte for byte: all but commits, which say when they were made."""
    names = storage.tree(str(store))
    return {name: (store / name).read_bytes() for name in names if not name.startswith("commits/")}


def stamps(store: Path) -> dict[Path, int]:
    """When each commit was written."""
    return {path: path.stat().st_mtime_ns for path in (store / "commits").glob("*.json")}


LOST = 5  # of eight images, the one that is missing at first


class Folder:
    """Shards of eight images, and their finished store with pixels; an image of each can be missing for a while."""

    def __init__(self, path: Path, shards: int) -> None:
        self.images, self.undisturbed, self._aside = path / "in", path / "undisturbed.zarr", path / "aside"
        self._lost = [shard * 8 + LOST for shard in range(shards)]
        self.images.mkdir()
        self._aside.mkdir()
        for row in range(8 * shards):
            (self.images / f"{row:03d}.jpg").write_bytes(make_jpeg((90 + row, 70), seed=row))

    @contextmanager
    def incomplete(self) -> Iterator[None]:
        self._move(self.images, self._aside)
        yield
        self._move(self._aside, self.images)

    def _move(self, one: Path, other: Path) -> None:
        for row in self._lost:
            (one / f"{row:03d}.jpg").rename(other / f"{row:03d}.jpg")

    def store(self, out: Path, clip: Clip) -> Store:
        request = PlanRequest(
            kind="image", arguments=(str(self.images),), shard_rows=8, batch_size=8, views=None, pixels=64
        )
        return open_or_plan(request, str(out), clip.identity)

    def words(self, out: Path, teacher_name: str) -> list[str]:
        sizes = ["--shard-rows", "8", "--batch-size", "8", "--pixels", "64", "--device", "cpu", "--workers", "2"]
        return ["cache-images", str(self.images), "--teacher", teacher_name, *sizes, "--out", str(out)]


def encode_rest(store: Store, clip: Clip) -> None:
    for shard in sorted(set(range(store.schema.shards)) - store.committed()):
        encode_shard(store, shard, clip)


def make_folder(path: Path, clip: Clip, shards: int) -> Folder:
    folder = Folder(path, shards)
    encode_rest(folder.store(folder.undisturbed, clip), clip)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Folder:
    return make_folder(tmp_path_factory.mktemp("folder"), clip, shards=8)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Folder:
    return make_folder(tmp_path_factory.mktemp("small"), clip, shards=2)


def assert_as_undisturbed(out: Path, folder: Folder, *, retried: bool = False) -> None:
    """The same bytes; of a store with retried rows the same but for the last bit of embeddings, since they were in
    another batch."""
    mine, theirs = data_files(out), data_files(folder.undisturbed)
    if retried:
        one, other = Store(str(out)), Store(str(folder.undisturbed))
        rows = one.schema.rows
        np.testing.assert_allclose(one.read(0, rows), other.read(0, rows), atol=1e-3)
        mine, theirs = ({k: v for k, v in d.items() if not k.startswith("embedding/c")} for d in (mine, theirs))
    assert mine == theirs
    assert verify(VerifyConfig(store=str(out))).trusted


def assert_no_ray_is_left() -> None:
    for _ in range(300):
        left = processes("ray::Worker")
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still there after 30 s: {left}")


def test_stage_1_killed_and_repeated_gives_the_same_store(folder: Folder, tmp_path: Path, teacher_name: str) -> None:
    """Killed while it plans, while its workers start, and while they work: one store has to survive all of it."""
    out = tmp_path / "s.zarr"
    words = folder.words(out, teacher_name)
    Command(words).kill_when(lambda: (out / "rows").exists())
    Command(words).kill_when(lambda: bool(processes("ray::Worker")))
    assert_no_ray_is_left()
    Command(words).kill_when(lambda: len(stamps(out)) >= 3)
    assert_no_ray_is_left()
    before = stamps(out)
    Command(words).finish()
    assert_as_undisturbed(out, folder)
    assert Store(str(out)).committed() == set(range(8))
    assert before.items() <= stamps(out).items(), "a finished shard was done again"


def test_a_killed_actor_is_replaced_and_its_shard_done_again(
    image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    out = tmp_path / "images.zarr"
    sizes = ["--shard-rows", "32", "--batch-size", "16", "--device", "cpu", "--workers", "2"]
    command = Command(["cache-images", str(image_tar), "--teacher", teacher_name, *sizes, "--out", str(out)])
    killed: list[int] = []
    while not command.ended() and not killed:
        busy = processes("ray::Worker.encode")
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
        time.sleep(0.01)
    command.finish()
    assert killed, "no actor was seen at work"
    assert data_files(out) == data_files(Path(image_store.path))


def test_a_retry_killed_and_repeated_gives_the_store_that_never_failed(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str
) -> None:
    out = tmp_path / "s.zarr"
    store = folder.store(out, clip)
    with folder.incomplete():
        encode_rest(store, clip)
    assert data_files(out) != data_files(folder.undisturbed)
    before = stamps(out)
    words = [*folder.words(out, teacher_name), "--retry-failed"]
    Command(words).kill_when(lambda: len(before.items() - stamps(out).items()) >= 3)
    assert not verify(VerifyConfig(store=str(out))).bad
    Command(words).finish()
    assert_as_undisturbed(out, folder, retried=True)


def killed_within_a_shard(path: str, teacher: str, work: str, moment: str) -> None:
    """Runs in a process of its own, which does not come to the end of it."""
    torch.set_num_threads(1)
    store, clip = Store(path), load_clip(teacher, device="cpu")
    sync, write_json, synced = storage._sync, storage.write_json, []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(file: Any) -> None:
        synced.append(file)
        if str(len(synced)) == moment:
            die()
        sync(file)

    def committing(file: str, value: object) -> None:
        if moment == "commit":
            die()
        write_json(file, value)

    storage._sync, storage.write_json = counting, committing  # type: ignore[assignment]
    {"encode": encode_shard, "retry": retry_shard}[work](store, 1, clip)


@pytest.mark.parametrize("work", ["encode", "retry"])
@pytest.mark.parametrize("moment", ["1", "4", "commit"])
def test_a_kill_at_any_moment_within_a_shard_leaves_it_undone(
    small_folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, work: str, moment: str
) -> None:
    """When the tar has its name (1), the embeddings (2), the status (4) and the places in the tar (6) are written, and
    when the commit is to be."""
    out = tmp_path / "s.zarr"
    store = small_folder.store(out, clip)
    if work == "retry":
        with small_folder.incomplete():
            encode_rest(store, clip)
    else:
        encode_shard(store, 0, clip)
    process = FORKING.Process(target=killed_within_a_shard, args=(str(out), teacher_name, work, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Store(str(out)).committed() == {0}
    assert not verify(VerifyConfig(store=str(out))).faults
    storage.remove_leftovers(str(out))
    encode_rest(store, clip)
    if work == "retry":
        retry_shard(store, 0, clip)
    assert_as_undisturbed(out, small_folder, retried=work == "retry")


def test_the_trainer_killed_and_repeated_gives_the_same_student(tiny_run: list[str], tmp_path: Path) -> None:
    Command([*tiny_run, "--out", str(tmp_path / "undisturbed")]).finish()
    out = tmp_path / "run"
    words = [*tiny_run, "--out", str(out)]
    Command(words).kill_when(lambda: (out / "run.json").exists())
    for step in (2, 4, 6):
        Command(words).kill_when(lambda step=step: (Checkpoints(str(out)).step() or 0) >= step)  # type: ignore[misc]
    Command(words).finish()
    assert Checkpoints(str(out)).step() == 8
    assert same(weights(tmp_path / "undisturbed"), weights(out))


def test_index_and_retrieve_killed_and_repeated_give_the_same_pairs(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    """Killed with half an index written, as its unfinished folder shows, and after the first commit of the pairs."""
    index, pairs, undisturbed = (tmp_path / name for name in ("t.index", "p.zarr", "undisturbed.zarr"))
    left = tmp_path / ".t.index.unfinished"
    left.mkdir()
    (left / "index.faiss").write_bytes(b"half an index")
    Command(["build-index", text_store.path, "--out", str(index)]).finish()
    assert not left.exists()
    search = ["retrieve", image_store.path, "--texts", text_store.path, "--index", str(index), "--out"]
    Command([*search, str(pairs)]).kill_when(lambda: (pairs / "commits").exists())
    Command([*search, str(pairs)]).finish()
    Command([*search, str(undisturbed)]).finish()
    for name in ("text_row", "score", "hits"):
        files = [file for file in (pairs / name).rglob("*") if file.is_file()]
        assert files
        for file in files:
            assert file.read_bytes() == (undisturbed / name / file.relative_to(pairs / name)).read_bytes()
