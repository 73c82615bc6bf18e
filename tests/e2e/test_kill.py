"""SIGKILL at several points, and the same command again: the same store, and on CPU the same student.

Each command is a process of its own, with a real local Ray; nothing is simulated. It is held by a gate at the moment
at which it is killed, which is then the same on every machine.
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

from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip, load_clip
from dimefm.retrieval import choose_index, recall
from dimefm.retrieval.index_search import IndexSearch, SearchParameters
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system import storage
from dimefm.system.storage import durable, files, folders
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.read_metrics import read_metrics
from tests.making import make_jpeg, write_tar
from tests.processes import FORKING, Command, Gate, processes
from tests.stores import random_store


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


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


ROWS, LOST = 4, 2  # images of a shard, and the one of them that is missing at first


class Folder:
    """Shards of four images, and their finished store with pixels; an image of each can be missing for a while."""

    def __init__(self, path: Path, shards: int) -> None:
        self.images, self.undisturbed, self._aside = path / "in", path / "undisturbed.zarr", path / "aside"
        self._lost = [shard * ROWS + LOST for shard in range(shards)]
        self.images.mkdir()
        self._aside.mkdir()
        for row in range(ROWS * shards):
            (self.images / f"{row:03d}.jpg").write_bytes(make_jpeg((90 + row, 70), seed=row))

    @contextmanager
    def incomplete(self) -> Iterator[None]:
        self._move(self.images, self._aside)
        try:
            yield
        finally:
            self._move(self._aside, self.images)

    def _move(self, one: Path, other: Path) -> None:
        for row in self._lost:
            (one / f"{row:03d}.jpg").rename(other / f"{row:03d}.jpg")

    def store(self, out: Path, clip: Clip) -> Store:
        request = PlanRequest(
            kind="image", arguments=(str(self.images),), shard_rows=ROWS, batch_size=ROWS, views=None, pixels=64
        )
        return open_or_plan(request, str(out), clip.identity)

    def words(self, out: Path, teacher_name: str, workers: int = 1) -> list[str]:
        sizes = ["--shard-rows", str(ROWS), "--batch-size", str(ROWS), "--pixels", "64", "--threads", "1"]
        more = ["--device", "cpu", "--workers", str(workers)]
        return ["cache-images", str(self.images), "--teacher", teacher_name, *sizes, *more, "--out", str(out)]

    def reading(self, shard: int) -> str:
        """Where a worker is that begins to read the image of a shard that was missing."""
        return f"open {self.images}/{self._lost[shard]:03d}.jpg"


def encode_rest(store: Store, clip: Clip, *, accept_missing: bool = False) -> None:
    for shard in sorted(set(range(store.schema.shards)) - store.committed()):
        encode_shard(store, shard, clip, accept_missing=accept_missing)


def make_folder(path: Path, clip: Clip, shards: int) -> Folder:
    folder = Folder(path, shards)
    encode_rest(folder.store(folder.undisturbed, clip), clip)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Folder:
    return make_folder(tmp_path_factory.mktemp("folder"), clip, shards=4)


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
    for _ in range(2400):
        left = processes("ray::Worker")
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still there after four minutes: {left}")


@pytest.mark.slow  # that a killed job goes on, shard by shard, has quicker tests
@pytest.mark.parametrize("often", [False, True], ids=["twice", "five times"])
def test_stage_1_killed_and_repeated_gives_the_same_store(
    folder: Folder, tmp_path: Path, teacher_name: str, gate: Gate, often: bool
) -> None:
    """Killed while it plans, while its workers start, and while they work: one store has to survive all of it."""
    out = tmp_path / "s.zarr"
    before: dict[Path, int] = {}

    def killed(at: str, due: Any = gate.waiting, workers: int = 1) -> None:
        gate.close(at=at)
        Command(folder.words(out, teacher_name, workers), gate).kill_when(due)
        assert_no_ray_is_left()
        assert before.items() <= stamps(out).items(), "a finished shard was done again"
        before.update(stamps(out))

    killed("os.rename */rows/000001.parquet")
    assert not (out / "zarr.json").exists()
    if often:
        killed("open *.jpg", due=lambda: processes("ray::Worker"), workers=2)
        killed(folder.reading(1), due=lambda: gate.waiting() and len(stamps(out)) == 3, workers=2)
        (out / "commits" / "000003.json").unlink()
        before.pop(out / "commits" / "000003.json")
        killed(folder.reading(3), workers=2)
    else:
        killed(folder.reading(2))
        assert len(before) == 2
    gate.open()
    Command(folder.words(out, teacher_name, workers=2 if often else 1)).finish()
    assert_as_undisturbed(out, folder)
    assert Store(str(out)).committed() == set(range(4))
    assert before.items() <= stamps(out).items(), "a finished shard was done again"


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_its_shard_done_again(
    small_folder: Folder, teacher_name: str, tmp_path: Path, gate: Gate
) -> None:
    out = tmp_path / "s.zarr"
    gate.close(at=small_folder.reading(1))
    command = Command(small_folder.words(out, teacher_name, workers=2), gate)
    command.wait_until(lambda: gate.waiting() and len(stamps(out)) == 1)
    before, (actor,) = stamps(out), gate.waiting()
    assert actor in processes("ray::Worker")
    os.kill(actor, signal.SIGKILL)
    gate.open()
    command.finish()
    assert data_files(out) == data_files(small_folder.undisturbed)
    assert before.items() <= stamps(out).items(), "a finished shard was done again"


@pytest.mark.slow
def test_a_retry_killed_and_repeated_gives_the_store_that_never_failed(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, gate: Gate
) -> None:
    out = tmp_path / "s.zarr"
    store = folder.store(out, clip)
    with folder.incomplete():
        encode_rest(store, clip, accept_missing=True)
    assert data_files(out) != data_files(folder.undisturbed)
    before = stamps(out)
    words = [*folder.words(out, teacher_name, workers=2), "--retry-failed"]
    gate.close(at=folder.reading(2))
    Command(words, gate).kill_when(lambda: gate.waiting() and len(before.items() - stamps(out).items()) == 3)
    assert not verify(VerifyConfig(store=str(out))).bad
    gate.open()
    Command(words).finish()
    assert_as_undisturbed(out, folder, retried=True)


def killed_within_a_shard(path: str, teacher: str, work: str, moment: str) -> None:
    """Runs in a process of its own, which does not come to the end of it."""
    torch.set_num_threads(1)
    store, clip = Store(path), load_clip(teacher, device="cpu")
    sync, write_json, synced = durable.sync, storage.write_json, []

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

    for module in (durable, files, folders):
        module.sync = counting  # type: ignore[attr-defined]
    storage.write_json = committing  # type: ignore[assignment]
    {"encode": encode_shard, "retry": retry_shard}[work](store, 1, clip)


@pytest.mark.parametrize(("work", "moment"), [
    ("retry", "4"), ("encode", "commit"), ("retry", "commit"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("encode", "1"), ("encode", "4"), ("retry", "1")]),
])  # fmt: skip
def test_a_kill_at_any_moment_within_a_shard_leaves_it_undone(
    small_folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, work: str, moment: str
) -> None:
    """When the tar has its name (1), the embeddings (2), the status (4) and the places in the tar (6) are written, and
    when the commit is to be."""
    out = tmp_path / "s.zarr"
    store = small_folder.store(out, clip)
    if work == "retry":
        with small_folder.incomplete():
            encode_rest(store, clip, accept_missing=True)
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


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_the_trainer_killed_again_and_again_gives_the_same_student(
    tiny_run: list[str], tmp_path: Path, gate: Gate, kills: int
) -> None:
    """At any moment, also within the writing of a checkpoint, and gone on with other numbers of workers; everything
    that a checkpoint has must be the same, to the last bit."""
    switches = ["--ema", "0.9", "--accumulate", "2", "--set", "loss.queue=24", "--set", "loss.logit_scale=learned"]
    last = 2 * kills + 2
    small = ["--checkpoint-every", "1", "--max-steps", str(last), "--epochs", "10", "--set", "loss.scale=30"]
    words = [*tiny_run, *small, *switches]
    whole, out = tmp_path / "undisturbed", tmp_path / "run"
    Command([*words, "--out", str(whole)]).finish()
    rng = np.random.default_rng(0)
    for kill in range(kills):
        step = 2 * kill + 2
        name, before = f"*/step-{step:08d}.pt", Checkpoints(str(out)).step() or 0
        gate.close(at=f"os.rename {name}")
        command = Command([*words, "--out", str(out), "--workers", str(kill % 3)], gate)
        command.wait_until(gate.waiting)
        if kill % 4 == 1:  # the checkpoint is there, and what says so is not
            gate.close(at="os.rename */last.json")
            command.wait_until(gate.waiting)
        elif kill % 4 == 2:  # it is said, and the oldest still there
            gate.close(at="os.remove */step-*.pt")
            command.wait_until(gate.waiting)
        elif kill % 4 == 3:  # whenever, within the next step
            gate.close(at=f"os.rename */step-{step + 1:08d}.pt")
            time.sleep(rng.uniform(0, 0.06))
        command.kill()
        reached = Checkpoints(str(out)).step() or 0
        assert before < reached <= step
    gate.open()
    Command([*words, "--out", str(out)]).finish()
    assert Checkpoints(str(out)).step() == last
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


def small_parts() -> None:
    """In the process of a command: parts of an index of one shard, and few queries to measure it with."""
    choose_index._PART_ROWS = (128, 128)  # type: ignore[misc]
    recall.QUERIES = 20  # type: ignore[misc]


class Searched:
    """Images, sentences for an index of five parts, the index, and the words of both commands."""

    def __init__(self, folder: Path) -> None:
        self.texts, _ = random_store(folder / "t.zarr", rows=600, shard_rows=128, kind="text")
        self.images, _ = random_store(folder / "i.zarr", rows=32, shard_rows=4, seed=1)
        self.index = folder / "undisturbed.index"
        Command(self.building(self.index), prepare=small_parts).finish()

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


@pytest.mark.parametrize("moments", [
    {"os.rename */build/part-*.faiss": 1, "os.rename */build/merged.faiss": 6, "os.rename */index.json": 6},
    pytest.param({
        "os.rename */build/trained.faiss": 0, "os.rename */build/part-*.json": 1, "open */build/.merged.faiss.*": 6,
        "os.rename */index-*.faiss": 6,
    }, marks=pytest.mark.slow),
], ids=["thrice", "at every step"])  # fmt: skip
def test_an_index_killed_and_repeated_is_the_same(
    searched: Searched, tmp_path: Path, gate: Gate, moments: dict[str, int]
) -> None:
    """Killed when it is trained, when its parts are there, and while it gets its name; by how many steps are done."""
    out = tmp_path / "t.index"
    before: dict[Path, int] = {}
    for moment, done in moments.items():
        gate.close(at=moment)
        Command(searched.building(out), gate, small_parts).kill_when(gate.waiting)
        assert before.items() <= steps(out).items(), "a finished step was done again"
        before = steps(out)
        assert len(before) == done
        assert not (out / "index.json").exists()
    gate.open()
    Command(searched.building(out), prepare=small_parts).finish()
    assert {path.name: path.read_bytes() for path in out.glob("index-*")} == {
        path.name: path.read_bytes() for path in searched.index.glob("index-*")
    }
    assert sorted(storage.listing(str(out))) == sorted(storage.listing(str(searched.index)))
    assert found_by(out) == found_by(searched.index)


def found_by(index: Path) -> list[list[float]]:
    """What each list of an index and its re-scoring give, whatever setting was the fastest when it was tuned."""
    queries_QD = np.eye(16, dtype=np.float32)
    scores_QK, rows_QK = IndexSearch.open(str(index)).search_with(SearchParameters(16, 10), queries_QD, 10)
    return [*scores_QK.tolist(), *rows_QK.tolist()]


@pytest.mark.parametrize("shards", [(3,), pytest.param((0, 1, 7), marks=pytest.mark.slow)])
def test_retrieval_killed_and_repeated_gives_the_same_pairs(
    searched: Searched, tmp_path: Path, gate: Gate, shards: tuple[int, ...]
) -> None:
    out, undisturbed = tmp_path / "p.zarr", tmp_path / "undisturbed.zarr"
    out.mkdir()
    (out / f"zarr.{'0f' * 16}.partial").write_bytes(b"{")  # as a kill within the very first write leaves it
    for shard in shards:
        gate.close(at=f"os.rename */commits/{shard:06d}.json")
        Command(searched.retrieving(out), gate).kill_when(gate.waiting)
        before = stamps(out)
        assert len(before) == shard
    gate.open()
    Command(searched.retrieving(out)).finish()
    Command(searched.retrieving(undisturbed)).finish()
    assert before.items() <= stamps(out).items(), "a finished shard was done again"
    assert data_files(out) == data_files(undisturbed)
    assert Pairs(str(out)).hit_counts() == Pairs(str(undisturbed)).hit_counts()


@pytest.mark.slow  # that a stopped command goes on in each of these parts has quicker tests
def test_captions_killed_and_repeated_are_the_same(teacher_name: str, tmp_path: Path, gate: Gate) -> None:
    """Killed while the images, then their captions and then whose they are is written."""
    members: dict[str, bytes] = {}
    for row in range(1040):
        said = [f"picture {row} of many", f"a picture by day {row % 7}"]
        members |= {f"{row:04d}.jpg": make_jpeg((20, 20), seed=row % 5), f"{row:04d}.txt": "\n".join(said).encode()}
    tar = write_tar(tmp_path / "a.tar", members)

    def words(out: Path) -> list[str]:
        more = ["--device", "cpu", "--workers", "1", "--threads", "1", "--shard-rows", "512", "--captions", "txt"]
        return ["cache-images", str(tar), "--teacher", teacher_name, *more, "--out", f"{out}/I.zarr"]

    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    captions, pairs = out / "I.captions.zarr", out / "I.captions.zarr" / "pairs"
    moments = {
        f"{out}/I.zarr/commits/000001.json": (1, 0, 0), f"{captions}/rows/000000.parquet": (3, 0, 0),
        f"{captions}/commits/000001.json": (3, 1, 0), f"{pairs}/zarr.json": (3, 3, 0),
        f"{pairs}/commits/000001.json": (3, 3, 1), f"{pairs}/commits/hits.json": (3, 3, 3),
    }  # fmt: skip
    for moment, done in moments.items():
        gate.close(at=f"os.rename {moment}")
        Command(words(out), gate).kill_when(gate.waiting)
        assert tuple(len(stamps(one)) for one in (out / "I.zarr", captions, pairs)) == done, moment
    gate.open()
    Command(words(out)).finish()
    Command(words(undisturbed)).finish()
    for store in ("I.zarr", "I.captions.zarr"):
        mine, theirs = data_files(out / store), data_files(undisturbed / store)
        assert mine.keys() == theirs.keys()
        differ = {name for name in mine if mine[name] != theirs[name]}
        assert not {name for name in differ if "/c/" in name or name.startswith("rows/0")}
        assert verify(VerifyConfig(store=str(out / store))).trusted
