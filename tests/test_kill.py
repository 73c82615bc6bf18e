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

import pytest

from dimefm.checkpoint import Checkpoints
from dimefm.store import Store
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
    """What must not differ: embeddings, status and plan, byte for byte."""
    parts = [p for name in ("embedding", "status", "rows") for p in (store / name).rglob("*") if p.is_file()]
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in parts}


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


@pytest.mark.parametrize("commits", [0, 1, 3])
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
