"""Images that crash their decoder, or take all memory: their rows get a status, whatever process they end at first.

A crash is a real one, of the process that opens the image: see tests/gate/sitecustomize.py.
"""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import OutOfMemoryError

from cache_schemas import Status
from cache_schemas.plan import planned_rows
from dimefm.caching.crashing_images import _RUNNING, running, without_crashes
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.worker import Job
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import StoreError, UnreadableError
from dimefm.evaluation.features import compute_features
from dimefm.models.clip import Clip
from dimefm.sources.base import ImageSample
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.progress import Progress
from pipeline import ray_workers
from tests.making import make_jpeg
from tests.processes import Command, Crash

ROWS, SHARD = 12, 4
BAD = (5, 6)  # rows in the second shard


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for row in range(ROWS):
        (folder / name_of(row)).write_bytes(make_jpeg(seed=row))
    return folder


def name_of(row: int) -> str:
    return f"{row:02d}-bad.jpg" if row in BAD else f"{row:02d}.jpg"


def planned(images: Path, out: Path, clip: Clip) -> Store:
    request = PlanRequest(kind="image", arguments=(str(images),), shard_rows=SHARD, batch_size=SHARD)
    return open_or_plan(request, str(out), clip.identity)


def crash_in_children(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Not in this process, which has no such hook."""
    for name, value in Crash(pattern).environment.items():
        monkeypatch.setenv(name, value)


def require_all_but_the_bad(store: Store, images: Path, out: Path, clip: Clip) -> None:
    """The same embeddings as where those images cannot be decoded: the others are in the same batches."""
    for row in BAD:
        (images / name_of(row)).write_bytes(b"no image")
    other = planned(images, out, clip)
    for shard in range(3):
        encode_shard(other, shard, clip)
    np.testing.assert_array_equal(store.read(0, ROWS), other.read(0, ROWS))
    assert [(f.row, f.status) for c in store.commits() for f in c.failures] == [(row, "CRASHED") for row in BAD]
    assert [row for row in range(ROWS) if store.status()[row] != Status.OK] == list(BAD)


@pytest.mark.parametrize(
    ("pattern", "end"),
    [
        pytest.param("*-bad.jpg", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("memory *-bad.jpg", "more than 8,589,934,592 bytes of memory", marks=pytest.mark.slow),
    ],
    ids=["crash", "memory"],
)
def test_the_rows_that_end_a_process_are_found_and_no_others(
    images: Path, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch, pattern: str, end: str
) -> None:
    store = planned(images, tmp_path / "s.zarr", clip)
    rows = [row for shard in range(3) for row in planned_rows(store.plan(shard))]
    crash_in_children(monkeypatch, pattern)
    found = without_crashes(rows, store.schema, torch.device("cpu"), 3)
    reason = f"decoding it ends the process: {end}"
    assert {row.row: row.crash for row in found if row.crash} == dict.fromkeys(BAD, reason)
    assert [row._replace(crash=None) for row in found] == rows


def test_a_process_that_dies_of_something_else_costs_no_row(
    images: Path, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = planned(images, tmp_path / "s.zarr", clip)
    crash_in_children(monkeypatch, "*/dimefm/caching/gpu_image_loader.py")  # while it starts
    rows = planned_rows(store.plan(1))
    assert without_crashes(rows, store.schema, torch.device("cpu"), 2) == rows


def test_a_mark_that_cannot_be_removed_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "remove_file", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    with pytest.raises(UnreadableError, match="cannot be read"), running(str(tmp_path)):
        raise UnreadableError("a.tar cannot be read")
    with pytest.raises(PermissionError), running(str(tmp_path)):
        pass


@pytest.mark.slow
def test_storage_that_does_not_answer_shows_no_traceback_of_the_search(
    images: Path, tmp_path: Path, clip: Clip, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads the images next says it."""
    store = planned(images, tmp_path / "s.zarr", clip)
    (images / name_of(1)).unlink()
    (images / name_of(1)).symlink_to(name_of(1))
    rows = planned_rows(store.plan(0))
    assert without_crashes(rows, store.schema, torch.device("cpu"), 1) == rows
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2], ids=["in the command's process", "two workers"])
def test_a_job_goes_on_without_the_images_that_crash(
    images: Path, tmp_path: Path, clip: Clip, teacher_name: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """One worker is the command's own process: it dies once, and the same command again gets through. A retry finds
    what has become of an image, and does not die of the others."""
    out = tmp_path / "s.zarr"
    sizes = ["--shard-rows", str(SHARD), "--batch-size", str(SHARD), "--workers", str(workers), "--threads", "1"]
    words = ["cache-images", str(images), "--teacher", teacher_name, *sizes, "--device", "cpu", "--out", str(out)]
    if workers == 1:
        Command(words, Crash("*-bad.jpg")).finish(-signal.SIGSEGV)
        assert Store(str(out)).committed() == {0}
        assert (out / _RUNNING).exists()
    printed = Command(words, Crash("*-bad.jpg")).finish(seconds=600)
    assert "lost its worker: once more, with a search for images that crash" in printed
    assert not (out / _RUNNING).exists()
    store = Store(str(out))
    require_all_but_the_bad(store, images, tmp_path / "o.zarr", clip)
    for row in BAD:
        (images / name_of(row)).write_bytes(make_jpeg(seed=row))
    crash_in_children(monkeypatch, "*/05-bad.jpg")
    retry_shard(store, 1, clip)
    assert [row for row in range(ROWS) if store.status()[row] != Status.OK] == [5]


@pytest.mark.slow
def test_an_evaluation_that_died_goes_on_without_the_image(
    images: Path, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features.zarr"
    places = [(path, path.stat().st_size) for path in sorted(images.iterdir())[: SHARD + 2]]
    samples = [ImageSample(path.stem, str(path), 0, size) for path, size in places]
    words: dict[str, Any] = {"name": "own", "split": "test", "where": "w", "layout": "l", "files": []}
    asked = ImageSet(**words, samples=samples, classnames=("a",), labels=np.zeros(len(samples), np.int64))
    with monkeypatch.context() as patch:
        patch.setattr("dimefm.evaluation.features.encode_shard", lambda *_, **__: (out / "died").touch() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compute_features(clip, asked, str(out))
    (out / _RUNNING).touch()  # as the crash that was left out would have left it
    crash_in_children(monkeypatch, "*-bad.jpg")
    found = compute_features(clip, asked, str(out))
    assert [(f.row, f.status) for f in found.failures()] == [(5, "CRASHED")]
    assert found.readable.tolist() == [True] * 5 + [False]


def test_a_worker_that_ray_ends_for_memory_is_a_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its shard, and what starts in its place, are treated with care from then on."""
    job = Job(store="s", teacher="t", pretrained=None, precision="fp32", device="cpu", threads=1)
    monkeypatch.setattr(ray_workers, "gpu_share", lambda *_: 0)
    supervisor = ray_workers._Supervisor(job, 1, 1, {7: 4}, check=False)
    asked: list[Any] = []

    class Actor:
        start = SimpleNamespace(remote=lambda *words, **more: asked.append(more) or "started")

    actor = Actor()
    monkeypatch.setattr(supervisor, "_new_actor", lambda: actor)

    def lost(reference: Any) -> Any:
        raise OutOfMemoryError("the node's memory is full")

    monkeypatch.setattr(ray_workers, "fetch", lost)
    for tries in (1, 2):
        supervisor._pending.clear()
        supervisor._running[actor] = 1
        supervisor._in_flight["encoded"] = (actor, 7)
        assert supervisor._settle("encoded", Progress("images", 4, "image")) == 0
        assert (supervisor._pending, supervisor._losses._tries) == ([7], {7: tries})
    assert asked == [{"careful": True}] * 2
    supervisor._in_flight["encoded"] = (actor, 7)
    with pytest.raises(StoreError, match="shard 7 lost its worker 3 times: the node's memory is full"):
        supervisor._settle("encoded", Progress("images", 4, "image"))


def test_a_run_that_ends_by_an_error_leaves_no_mark(tmp_path: Path) -> None:
    def run(error: type[BaseException] | None) -> bool:
        with running(str(tmp_path)) as died:
            if error:
                raise error
        return died

    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            run(error)
    assert run(None) is False
    (tmp_path / _RUNNING).touch()
    assert run(None) is True
    assert run(None) is False
