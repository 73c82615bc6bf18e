"""Stage 1 on a real local Ray: several workers, one writer a shard, errors that arrive as they were raised."""

import os
import pickle
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from cache_schemas import Status
from cache_schemas.embedding_store import rows_path
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.worker import SHARDS_AT_ONCE
from dimefm.errors import DimefmError, MismatchError, UnreadableError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.shard_work import Seat
from pipeline import ray_cluster, ray_shards, ray_workers
from pipeline.cache import CacheConfig, cache, dry_run
from pipeline.ray_workers import Job, Worker, run_shards
from tests.making import make_jpeg
from tests.stores import teacher_identity


@pytest.fixture
def partial_store(image_store: Store, tmp_path: Path) -> Store:
    """A copy of the finished store without its second shard."""
    out = Path(shutil.copytree(image_store.path, tmp_path / "i.zarr"))
    (out / "commits" / "000001.json").unlink()
    (out / "embedding" / "c" / "1" / "0").unlink()
    return Store(str(out))


def config(out: Path, image_tar: Path, teacher_name: str, **changes: object) -> CacheConfig:
    words = {"kind": "image", "sources": (str(image_tar),), "out": str(out), "teacher": teacher_name, "device": "cpu"}
    return CacheConfig(**{**words, "shard_rows": 32, "batch_size": 16, "workers": 2, "threads": 1, **changes})


def test_ray_writes_what_one_process_writes(
    one_ray: None, image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    store = cache(config(tmp_path / "i.zarr", image_tar, teacher_name))
    assert store.committed() == {0, 1, 2}
    np.testing.assert_array_equal(store.read(0, 96), image_store.read(0, 96))
    assert store.schema.identity == image_store.schema.identity
    for shard in range(3):
        assert store.plan(shard).equals(image_store.plan(shard))
    assert [c.digest for c in store.commits()] == [c.digest for c in image_store.commits()]


@pytest.mark.slow
def test_two_shards_at_once_in_each_worker_write_the_same(
    one_ray: None,
    image_store: Store,
    image_tar: Path,
    teacher_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, with Ray and without."""
    monkeypatch.setitem(SHARDS_AT_ONCE, "cpu", 2)
    for workers in (1, 2):
        out = tmp_path / f"{workers}.zarr"
        store = cache(config(out, image_tar, teacher_name, workers=workers, shard_rows=16, threads=2))
        assert store.committed() == set(range(6))
        np.testing.assert_array_equal(store.read(0, 96), image_store.read(0, 96))


def test_one_shard_left_is_written_as_among_many(
    one_ray: None, partial_store: Store, image_store: Store, image_tar: Path, teacher_name: str
) -> None:
    """One shard, one worker, all cores: on more threads a CPU adds up in another order, and gives other bytes."""
    again = cache(config(Path(partial_store.path), image_tar, teacher_name, threads=None))
    np.testing.assert_array_equal(again.read(0, 96), image_store.read(0, 96))


def test_a_finished_store_needs_no_ray(
    image_store: Store, image_tar: Path, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ray_workers.cluster", lambda *_: pytest.fail("Ray was started for nothing"))
    assert cache(config(Path(image_store.path), image_tar, teacher_name)).path == image_store.path


@pytest.mark.slow
def test_what_a_worker_refuses_arrives_as_one_line(
    one_ray: None, image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    """Workers that load another teacher than the plan's, as after a file was replaced under a running cluster."""
    request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=32)
    store = open_or_plan(request, str(tmp_path / "i.zarr"), teacher_identity())
    job = Job(store=store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=1)
    with pytest.raises(DimefmError, match=r"is not the teacher of"):
        run_shards(job, workers=1)
    assert not store.committed()


@pytest.mark.slow
def test_what_a_worker_cannot_read_arrives_as_it_was(
    one_ray: None, image_tar: Path, teacher_name: str, clip: Clip, tmp_path: Path
) -> None:
    request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=96)
    store = open_or_plan(request, str(tmp_path / "i.zarr"), clip.identity)
    job = Job(store=store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=1)
    rows = tmp_path / "i.zarr" / rows_path(0)
    rows.unlink()
    rows.symlink_to(rows.name)
    with pytest.raises(OSError, match="symbolic links") as caught:
        run_shards(job, workers=1)
    assert type(caught.value) is OSError
    assert caught.value.filename == str(rows)


@pytest.mark.parametrize("threads", [None, 1])
def test_more_workers_than_devices_are_refused_instead_of_waited_for(
    one_ray: None,
    image_tar: Path,
    teacher_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
) -> None:
    monkeypatch.setattr("pipeline.ray_workers.ray.cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(DimefmError, match=r"2 workers need 2 CPUs, and Ray has 1(?s:.*)--workers 1"):
        cache(config(tmp_path / "i.zarr", image_tar, teacher_name, threads=threads))


def test_the_canary_runs_before_more_is_added(
    one_ray: None, partial_store: Store, image_tar: Path, teacher_name: str
) -> None:
    partial_store.group["embedding"][0:32] = np.roll(partial_store.read(0, 32), 1, axis=1)
    with pytest.raises(MismatchError, match="encoded again has cosine"):
        cache(config(Path(partial_store.path), image_tar, teacher_name))
    assert partial_store.committed() == {0, 2}


def test_a_retry_on_ray_does_the_rows_that_failed(one_ray: None, clip: Clip, teacher_name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for row in range(4):
        (folder / f"{row}.jpg").write_bytes(make_jpeg(seed=row))
    request = PlanRequest(kind="image", arguments=(str(folder),), shard_rows=2, batch_size=2)
    store = open_or_plan(request, str(tmp_path / "i.zarr"), clip.identity)
    (folder / "3.jpg").rename(tmp_path / "3.jpg")
    for shard in range(2):
        encode_shard(store, shard, clip, accept_missing=True)
    assert store.status().tolist() == [Status.OK] * 3 + [Status.MISSING]
    (tmp_path / "3.jpg").rename(folder / "3.jpg")
    before = (tmp_path / "i.zarr" / "commits" / "000000.json").read_bytes()
    words = {"shard_rows": 2, "batch_size": 2, "workers": 1, "retry_failed": True}
    assert cache(config(tmp_path / "i.zarr", folder, teacher_name, **words)).status().tolist() == [Status.OK] * 4
    assert (tmp_path / "i.zarr" / "commits" / "000000.json").read_bytes() == before


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one Ray as a cluster of two machines, and a worker on each."""
    monkeypatch.setattr(ray_workers, "machines", lambda: 2)
    monkeypatch.setattr(ray_workers, "Worker", Elsewhere)


class Elsewhere(Worker):
    """A worker on machine a or b, by who comes first. On b no tar can be read, and a waits until b found that out."""

    def start(self, threads: int, shard: int, check: bool = False, careful: bool = False) -> str | None:
        told, really = super().start(threads, shard, check, careful), storage.read_bytes
        first, self.found_out = Path(self._job.store, ".first"), Path(self._job.store, ".found-out")
        self.machine = "b" if first.exists() else "a"
        first.touch()

        def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
            if path.endswith(".tar") and self.machine == "b":
                self.found_out.touch()
                raise FileNotFoundError(2, "No such file or directory", path)
            return really(path, offset, size)

        storage.read_bytes = read
        socket.gethostname = lambda: self.machine
        return told

    def encode(self, shard: int, done: Any = None, careful: bool = False) -> Any:
        waited = time.monotonic()
        while self.machine == "a" and not self.found_out.exists() and time.monotonic() < waited + 60:
            time.sleep(0.05)
        return super().encode(shard)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "two_machines")
def test_a_machine_without_the_mount_is_put_aside_and_its_shard_goes_to_another(
    image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = cache(config(tmp_path / "i.zarr", image_tar, teacher_name, shard_rows=16))
    np.testing.assert_array_equal(store.read(0, 96), image_store.read(0, 96))
    told = capsys.readouterr().err
    assert told.count("b: 16 of 16 images of a shard were there when they were planned and are gone, the first") == 1
    assert f"No such file or directory: '{image_tar}'; its worker is put aside, and the others go on" in told


class Told:
    """In place of a progress bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def from_host(host: str) -> UnreadableError:
    error = UnreadableError("a.tar cannot be read")
    error.host = host
    return error


def test_workers_are_put_aside_until_a_shard_fails_on_two_machines_or_none_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(store="s", teacher="t", pretrained=None, precision="fp32", device="cpu", threads=1)
    progress: Any = Told()

    def supervisor(machines: int) -> Any:
        monkeypatch.setattr(ray_workers, "machines", lambda: machines)
        found = ray_workers._Supervisor(job, 3, 1, {0: 4, 1: 4}, check=False)
        found._running, found._pending = dict.fromkeys("xyz", 1), []
        return found

    two = supervisor(2)
    two._put_aside("x", 0, from_host("a"), progress)
    assert (two._pending, set(two._running)) == ([0], {"y", "z"})
    two._put_aside("x", 1, from_host("a"), progress)  # the other shard that it had
    two._put_aside("y", 0, from_host("a"), progress)  # another of its machine
    assert (two._pending, set(two._running), two._aside) == ([0, 1, 0], {"z"}, 2)
    assert progress.notes == ["a: a.tar cannot be read; its worker is put aside, and the others go on"] * 2
    with pytest.raises(UnreadableError, match=r"a\.tar cannot be read"):
        two._put_aside("z", 0, from_host("b"), progress)
    two = supervisor(2)
    for actor in "xy":
        two._put_aside(actor, None, from_host("a"), progress)
    with pytest.raises(UnreadableError):
        two._put_aside("z", None, from_host("a"), progress)
    with pytest.raises(UnreadableError):
        supervisor(1)._put_aside("x", 0, from_host("a"), progress)


def test_all_that_is_done_is_taken_at_once_and_a_silent_worker_is_not_waited_for(
    one_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [ray.put(number) for number in range(3)]
    assert set(ray_cluster.ready(done, 1.0)) == set(done)
    assert ray_cluster.ready([], 1.0) == []
    monkeypatch.setattr(ray_workers, "ready", lambda asked, _: [one for one in asked if one in done])
    monkeypatch.setattr(ray_workers, "_LOOK", 0)
    job = Job(store="s", teacher="t", pretrained=None, precision="fp32", device="cpu", threads=1)
    supervisor: Any = ray_workers._Supervisor(job, 3, 1, {0: 4, 1: 4}, check=False)
    silent, answering, idle = Asked({}), Asked({0: 3}), Asked({})
    supervisor._running = {silent: 1, answering: 1, idle: 0}
    supervisor._in_flight = {"x": (answering, 0), "y": (silent, 1)}
    for _ in range(3):
        supervisor._count_rows()
        done += answering.asked
    assert supervisor._counted == {0: 3}
    assert [len(actor.asked) for actor in (silent, answering, idle)] == [1, 3, 0]


class Asked:
    """An actor that is asked how many rows are done."""

    def __init__(self, rows: dict[int, int]) -> None:
        self.asked: list[Any] = []
        self._rows, self.rows = rows, SimpleNamespace(remote=self._asked)

    def _asked(self) -> Any:
        self.asked.append(ray.put(self._rows))
        return self.asked[-1]


def test_an_error_from_another_machine_keeps_its_name() -> None:
    again = pickle.loads(pickle.dumps(from_host("a")))
    assert (again.host, again.what, str(again)) == ("a", "a.tar cannot be read", "a.tar cannot be read")


def test_a_dry_run_counts_and_writes_nothing(image_tar: Path, teacher_name: str, tmp_path: Path) -> None:
    text = dry_run(config(tmp_path / "i.zarr", image_tar, teacher_name))
    for part in ("rows +96 from 1 file,", "shards +3", "24.7 kB", "weights +sha256 "):
        assert re.search(part, text)
    assert not (tmp_path / "i.zarr").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_teacher_gives_the_same_embeddings(
    image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 12 over shards of 32 rows: the last one of a shard is padded to the size that was compiled."""
    request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=32, batch_size=12)
    store = open_or_plan(request, str(tmp_path / "i.zarr"), image_store.schema.teacher)
    job = Job(store=store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=1)
    worker = Worker(replace(job, compile=True))
    worker.start(1, 0)
    sizes, encode = set(), worker._clip._encode_compiled
    monkeypatch.setattr(worker._clip, "_encode_compiled", lambda images: sizes.add(len(images)) or encode(images))
    for shard in range(3):
        worker.encode(shard)
    compiled, plain = store.read(0, 96).astype(np.float32), image_store.read(0, 96).astype(np.float32)
    np.testing.assert_allclose(compiled, plain, atol=2e-3)
    assert sizes == {12}


# -- GPUs, of which Ray believes what it is told ----------------------------------------------------------------------


class Seen:
    """Work that says which GPUs its process may see, and what its seat has."""

    def open(self, seat: Seat) -> Callable[[str], tuple[str | None, str | None]]:
        return lambda unit: (os.environ.get("CUDA_VISIBLE_DEVICES"), seat.device)

    def name(self, unit: str) -> str:
        return unit


class Seeing:
    """In place of a worker."""

    def __init__(self, job: Job) -> None:
        pass

    def see(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_what_runs_on_ray_sees_the_gpu_that_it_has_and_no_other(one_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "Worker", Seeing)
    job = Job(store="s", teacher="t", pretrained=None, precision="fp32", device="cpu", threads=1)
    actor = ray_workers._Supervisor(job, 1, 1, {}, check=False)._new_actor()
    assert ray_cluster.fetch(actor.see.remote()) == "", "a worker of --device cpu"
    seen = dict(ray_shards.on_ray(1, device=None)(Seen(), ["a", "b"]))
    assert seen in [dict.fromkeys("ab", (gpu, "cuda")) for gpu in "01"]
    assert list(ray_shards.on_ray(1)(Seen(), ["a"])) == [("a", ("", "cpu"))]


@pytest.mark.parametrize(("workers", "gpus", "share"), [(2, 2, 1), (2, 8, 1), (4, 2, 1 / 2), (5, 2, 1 / 3), (3, 0, 0)])
def test_more_workers_than_gpus_share_them(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus: int, share: float
) -> None:
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    assert ray_cluster.gpu_share(workers, "cuda") == share
    assert ray_cluster.gpu_share(workers, "cpu") == 0
