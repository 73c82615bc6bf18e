"""SIGKILL at several points, and the same command again: the same store, and on CPU the same student.

The commands run as a user runs them, with a real local Ray; nothing is simulated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.clip import Clip
from dimefm.store import Store
from pipeline.plan import PlanRequest, open_or_plan
from pipeline.shard import encode_shard, retry_shard
from pipeline.verify import VerifyConfig, verify
from tests.making import make_jpeg
from tests.training import same, weights

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dimefm", *words],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "dimefm", *words], env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def kill_when(process: subprocess.Popen[bytes], due: Callable[[], bool]) -> None:
    """SIGKILL as soon as `due`; fails where the process ended before, since then nothing was tested."""
    for _ in range(12_000):
        if due():
            break
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()


def data_files(store: Path) -> dict[str, bytes]:
    """What must not differ, byte for byte: all but commits, which say when they were made."""
    names = storage.tree(str(store))
    return {name: (store / name).read_bytes() for name in names if not name.startswith("commits/")}


def processes(title: str) -> list[int]:
    """Process ids whose command line begins with `title`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def cache_words(image_tar: Path, teacher_name: str) -> list[str]:
    return ["cache-images", str(image_tar), "--teacher", teacher_name, "--shard-rows", "16", "--workers", "2"]


@pytest.fixture(scope="module")
def undisturbed_store(cache_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "undisturbed.zarr"
    finish([*cache_words, "--out", str(out)])
    return out


@pytest.mark.parametrize("commits", [0, 3])
def test_stage_1_killed_and_repeated_gives_the_same_store(
    cache_words: list[str], undisturbed_store: Path, tmp_path: Path, commits: int
) -> None:
    out = tmp_path / "images.zarr"
    words = [*cache_words, "--out", str(out)]

    def due() -> bool:
        if commits == 0:
            return (out / "rows").exists()
        return len(list((out / "commits").glob("*.json"))) >= commits if (out / "commits").exists() else False

    kill_when(start(words), due)
    before = Store(str(out)).committed() if commits else set()
    stamps = {s: (out / "commits" / f"{s:06d}.json").stat().st_mtime_ns for s in before}
    finish(words)
    assert data_files(out) == data_files(undisturbed_store)
    assert Store(str(out)).committed() == set(range(6))
    for shard, stamp in stamps.items():
        assert (out / "commits" / f"{shard:06d}.json").stat().st_mtime_ns == stamp, "a finished shard was done again"


def test_a_killed_actor_is_replaced_and_its_shard_done_again(
    cache_words: list[str], undisturbed_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "images.zarr"
    process = start([*cache_words, "--out", str(out)])
    killed: list[int] = []
    while process.poll() is None and not killed:
        busy = processes("ray::Worker.encode")
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
        time.sleep(0.01)
    assert killed, "no actor was seen at work"
    assert process.wait(timeout=240) == 0
    assert data_files(out) == data_files(undisturbed_store)


def test_a_killed_driver_leaves_no_ray_behind(cache_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "images.zarr"
    process = start([*cache_words, "--out", str(out)])
    kill_when(process, lambda: bool(processes("ray::Worker")))
    for _ in range(300):
        left = processes("ray::Worker")
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still there after 30 s: {left}")


# -- pixels, retries, and the moments within a shard --------------------------------------------------------------

LOST = 5  # of eight images, the one that is missing at first


class Folder:
    """Shards of eight images, and their finished store with pixels; an image of each can be taken away and put back."""

    def __init__(self, path: Path, shards: int) -> None:
        self.images, self.undisturbed, self._aside = path / "in", path / "undisturbed.zarr", path / "aside"
        self._lost = [shard * 8 + LOST for shard in range(shards)]
        self.images.mkdir()
        self._aside.mkdir()
        for row in range(8 * shards):
            (self.images / f"{row:03d}.jpg").write_bytes(make_jpeg((90 + row, 70), seed=row))

    def take(self) -> None:
        self._move(self.images, self._aside)

    def put_back(self) -> None:
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


@pytest.fixture
def folder(tmp_path: Path, clip: Clip) -> Folder:
    return make_folder(tmp_path, clip, shards=8)


@pytest.fixture
def small_folder(tmp_path: Path, clip: Clip) -> Folder:
    return make_folder(tmp_path, clip, shards=2)


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


def test_stage_1_with_pixels_killed_and_repeated_gives_whole_tars(
    folder: Folder, tmp_path: Path, teacher_name: str
) -> None:
    out = tmp_path / "s.zarr"
    words = folder.words(out, teacher_name)
    kill_when(start(words), lambda: len(list((out / "commits").glob("*.json"))) >= 3)
    finish(words)
    assert_as_undisturbed(out, folder)


def test_a_retry_killed_and_repeated_gives_the_store_that_never_failed(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str
) -> None:
    out = tmp_path / "s.zarr"
    store = folder.store(out, clip)
    folder.take()
    encode_rest(store, clip)
    folder.put_back()
    assert data_files(out) != data_files(folder.undisturbed)
    before = {path: path.stat().st_mtime_ns for path in (out / "commits").iterdir()}
    words = [*folder.words(out, teacher_name), "--retry-failed"]
    kill_when(start(words), lambda: sum(_stamp(path) != stamp for path, stamp in before.items()) >= 3)
    assert not verify(VerifyConfig(store=str(out))).bad
    finish(words)
    assert_as_undisturbed(out, folder, retried=True)


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


KILLED = """
import os, signal, sys
import torch
from dimefm import storage
from dimefm.clip import load_clip
from dimefm.store import Store
from pipeline import shard

path, teacher, work, moment = sys.argv[1:]
torch.set_num_threads(1)
store, clip = Store(path), load_clip(teacher, device="cpu")
sync, write_json, synced = storage._sync, storage.write_json, []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counting(file):
    synced.append(file)
    if str(len(synced)) == moment:
        die()
    sync(file)

def committing(file, value):
    if moment == "commit":
        die()
    write_json(file, value)

storage._sync, storage.write_json = counting, committing
getattr(shard, work)(store, 1, clip)
"""


@pytest.mark.parametrize("work", ["encode_shard", "retry_shard"])
@pytest.mark.parametrize("moment", ["1", "4", "commit"])
def test_a_kill_at_any_moment_within_a_shard_leaves_it_undone(
    small_folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, work: str, moment: str
) -> None:
    """When the tar has its name (1), the embeddings (2), the status (4) and the places in the tar (6) are written, and
    when the commit is to be."""
    out = tmp_path / "s.zarr"
    store = small_folder.store(out, clip)
    if work == "retry_shard":
        small_folder.take()
    encode_shard(store, 0, clip)
    if work == "retry_shard":
        encode_shard(store, 1, clip)
        small_folder.put_back()
    words = [sys.executable, "-W", "ignore", "-c", KILLED, str(out), teacher_name, work, moment]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert Store(str(out)).committed() == {0}
    assert not verify(VerifyConfig(store=str(out))).faults
    storage.remove_leftovers(str(out))
    encode_rest(store, clip)
    if work == "retry_shard":
        retry_shard(store, 0, clip)
    assert_as_undisturbed(out, small_folder, retried=work == "retry_shard")


def test_the_trainer_killed_and_repeated_gives_the_same_student(tiny_run: list[str], tmp_path: Path) -> None:
    finish([*tiny_run, "--out", str(tmp_path / "undisturbed")])
    out = tmp_path / "run"
    words = [*tiny_run, "--out", str(out)]
    kill_when(start(words), lambda: (out / "run.json").exists())
    for step in (2, 4, 6):
        kill_when(start(words), lambda step=step: (Checkpoints(str(out)).step() or 0) >= step)  # type: ignore[misc]
    finish(words)
    assert Checkpoints(str(out)).step() == 8
    assert same(weights(tmp_path / "undisturbed"), weights(out))


@pytest.mark.parametrize("moment", ["unfinished folder", "first commit"])
def test_index_and_retrieve_killed_and_repeated_give_the_same_pairs(
    image_store: Store, text_store: Store, tmp_path: Path, moment: str
) -> None:
    index, pairs = tmp_path / "t.index", tmp_path / "p.zarr"
    build = ["build-index", text_store.path, "--out", str(index)]
    search = ["retrieve", image_store.path, "--texts", text_store.path, "--index", str(index), "--out", str(pairs)]
    if moment == "unfinished folder":
        left = tmp_path / ".t.index.unfinished"
        left.mkdir()
        (left / "index.faiss").write_bytes(b"half an index")
        finish(build)
        assert not left.exists()
    else:
        finish(build)
        kill_when(start(search), lambda: (pairs / "commits").exists())
    finish(search)
    undisturbed = tmp_path / "undisturbed.zarr"
    finish([*search[:-1], str(undisturbed)])
    for name in ("text_row", "score", "hits"):
        ours = sorted((pairs / name).rglob("*"))
        for file in ours:
            if file.is_file():
                assert file.read_bytes() == (undisturbed / name / file.relative_to(pairs / name)).read_bytes()
