"""SIGKILL at several points, and the same command again: the same store, and on CPU the same student.

Each command is a process of its own, with a real local Ray; nothing is simulated.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.clip import Clip, load_clip
from dimefm.index import Index
from dimefm.pairs import Pairs
from dimefm.recall import Setting
from dimefm.runlog import read_metrics
from dimefm.shard import encode_shard, retry_shard
from dimefm.store import Store
from pipeline.plan import PlanRequest, open_or_plan
from pipeline.verify import VerifyConfig, verify
from tests.making import make_jpeg
from tests.processes import FORKING, Command, processes
from tests.stores import random_store

pytestmark = pytest.mark.slow


def data_files(store: Path) -> dict[str, bytes]:
    """What must not differ, byte for byte: all but commits, which say when they were made."""
    names = storage.tree(str(store))
    return {name: (store / name).read_bytes() for name in names if not name.startswith("commits/")}


def stamps(store: Path) -> dict[Path, int]:
    """When each commit was written. One that is being replaced at this moment is not there."""
    found = {}
    for path in (store / "commits").glob("*.json"):
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    return found


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


def test_the_trainer_killed_twenty_times_gives_the_same_student(tiny_run: list[str], tmp_path: Path) -> None:
    """At any moment, also within the writing of a checkpoint, and gone on with other numbers of workers; everything
    that a checkpoint has must be the same, to the last bit."""
    switches = ["--ema", "0.9", "--accumulate", "2", "--set", "loss.queue=24", "--set", "loss.logit_scale=learned"]
    small = ["--student", "test_resnet", "--checkpoint-every", "1", "--max-steps", "40", "--epochs", "10"]
    words = [*tiny_run, *small, *switches, "--set", "loss.scale=30"]
    whole, out = tmp_path / "undisturbed", tmp_path / "run"
    Command([*words, "--out", str(whole)]).finish()
    rng = np.random.default_rng(0)
    Command([*words, "--out", str(out)]).kill_when(lambda: (out / "run.json").exists())
    for kill in range(1, 20):
        command = Command([*words, "--out", str(out), "--workers", str(kill % 3)])
        before = Checkpoints(str(out)).step() or 0
        command.wait_until(lambda before=before: (Checkpoints(str(out)).step() or 0) > before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.06))
        command.kill()
        reached = Checkpoints(str(out)).step() or 0
        assert before < reached < 40, f"kill {kill} came at step {reached}"
    Command([*words, "--out", str(out)]).finish()
    assert Checkpoints(str(out)).step() == 40
    one, other = (flat(Checkpoints(str(run)).load()) for run in (whole, out))
    assert one.keys() == other.keys()
    assert [name for name in one if not equal(one[name], other[name])] == []
    assert {"image.ema.steps", "image.objective.student_QD", "image.objective.log_scale"} <= one.keys()
    lines = [line["step"] for line in read_metrics(str(out)) if line["event"] == "train"]
    assert lines == sorted(set(lines))


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a checkpoint by their path."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()}
    return {name: state}


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


class Searched:
    """Images, so many sentences that an index over them has three parts, and the words of both commands."""

    def __init__(self, folder: Path) -> None:
        self.texts, _ = random_store(folder / "t.zarr", rows=140_000, shard_rows=16384, kind="text")
        self.images, _ = random_store(folder / "i.zarr", rows=128, shard_rows=4, seed=1)
        self.index = folder / "undisturbed.index"
        Command(self.building(self.index)).finish()

    def building(self, out: Path) -> list[str]:
        settings = ["--factory", "IVF16,SQ8", "--recall", "0.5", "--queries", self.images.path]
        return ["build-index", self.texts.path, *settings, "--out", str(out)]

    def retrieving(self, out: Path) -> list[str]:
        return ["retrieve", self.images.path, "--texts", self.texts.path, "--index", str(self.index), "--out", str(out)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return Searched(tmp_path_factory.mktemp("searched"))


def steps(index: Path) -> dict[Path, int]:
    """When each finished step of a build was written."""
    return {path: path.stat().st_mtime_ns for path in (index / "build").glob("*.json")}


def test_an_index_killed_and_repeated_is_the_same(searched: Searched, tmp_path: Path) -> None:
    """Killed when it is trained, when one of its three parts is there, when all are, and while it gets its name."""
    out = tmp_path / "t.index"
    build = out / "build"
    before: dict[Path, int] = {}
    for done in (1, 2, 4):
        Command(searched.building(out)).kill_when(lambda done=done: len(steps(out)) >= done)  # type: ignore[misc]
        assert before.items() <= steps(out).items(), "a finished step was done again"
        before = steps(out)
        assert not (out / "index.json").exists()
        assert build / "trained.json" in before
        assert len(before) < 4 or done == 4, "killed when all was done"
    Command(searched.building(out)).kill_when(lambda: any([*build.glob("*merged.faiss*"), *out.glob("index-*.faiss")]))
    assert before.items() <= steps(out).items() or (out / "index.json").exists()
    Command(searched.building(out)).finish()
    assert {path.name: path.read_bytes() for path in out.glob("index-*")} == {
        path.name: path.read_bytes() for path in searched.index.glob("index-*")
    }
    assert sorted(storage.listing(str(out))) == sorted(storage.listing(str(searched.index)))
    assert found_by(out) == found_by(searched.index)


def found_by(index: Path) -> list[list[float]]:
    """What each list of an index and its re-scoring give, whatever setting was the fastest when it was tuned."""
    queries_QD = np.eye(16, dtype=np.float32)
    scores_QK, rows_QK = Index.open(str(index)).search_with(Setting(16, 10), queries_QD, 10)
    return [*scores_QK.tolist(), *rows_QK.tolist()]


def test_retrieval_killed_and_repeated_gives_the_same_pairs(searched: Searched, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "p.zarr", tmp_path / "undisturbed.zarr"
    out.mkdir()
    (out / "zarr.0123.partial").write_bytes(b"{")  # as a kill within the very first write leaves it
    for done in (1, 8):
        Command(searched.retrieving(out)).kill_when(lambda done=done: len(stamps(out)) >= done)  # type: ignore[misc]
        before = stamps(out)
        assert len(before) < 32, "killed when all was done"
    Command(searched.retrieving(out)).finish()
    Command(searched.retrieving(undisturbed)).finish()
    assert before.items() <= stamps(out).items(), "a finished shard was done again"
    assert data_files(out) == data_files(undisturbed)
    assert Pairs(str(out)).selection() == Pairs(str(undisturbed)).selection()
