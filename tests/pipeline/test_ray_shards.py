"""Work on shards on a real local Ray: done once each, opened once per worker, and again where a worker is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from dimefm.errors import DimefmError, StoreError, UnreadableError
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from dimefm.system import lease, named_paths
from dimefm.system.file_cache import active, caching_in
from dimefm.system.shard_work import Seat, run_here
from pipeline import ray_shards
from pipeline.ray_shards import on_ray
from tests.stores import random_store


@dataclass(frozen=True)
class Squares:
    """Writes down who opened it; at the unit `deadly` the process dies, once."""

    folder: Path
    deadly: int | None = None
    unreadable: int | None = None

    def open(self, seat: Seat) -> Callable[[int], tuple[int, int]]:
        (self.folder / f"open-{os.getpid()}").touch(exist_ok=False)
        tokens = lease.held() | {"schemes": named_paths.allowed()}
        if cache := active():
            tokens["cache"] = f"{cache.folder}, {cache.limit}"
        (self.folder / "seat").write_text(f"{seat} {tokens}")
        return self._square

    def _square(self, unit: int) -> tuple[int, int]:
        if unit == self.deadly and not (dead := self.folder / "dead").exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == self.unreadable:
            raise UnreadableError(f"{unit} cannot be read", remedy="mount it")
        return unit * unit, os.getpid()

    def name(self, unit: int) -> str:
        return f"shard {unit}"


def supervisor(folder: Path) -> tuple[Any, list[str]]:
    """One of three workers and two shards, with actors that only seem to be; and its notes."""
    actor, notes = SimpleNamespace(open=SimpleNamespace(remote=object)), list[str]()
    return ray_shards._Supervisor(lambda: actor, 3, Squares(folder), range(2), notes.append), notes


def test_each_unit_is_done_and_a_worker_opens_once(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the command's leases, with the schemes that its user allows, and through its cache."""
    monkeypatch.setenv(named_paths.VARIABLE, "sftp")
    monkeypatch.setitem(lease._held, "memory://out", "token")
    with caching_in(str(tmp_path / "cache"), 10**6):
        done = dict(on_ray(2)(Squares(tmp_path), range(9)))
    assert {unit: square for unit, (square, _) in done.items()} == {unit: unit * unit for unit in range(9)}
    opened = {int(path.name.removeprefix("open-")) for path in tmp_path.glob("open-*")}
    assert {process for _, process in done.values()} <= opened - {os.getpid()}
    assert len(opened) <= 2
    told = (tmp_path / "seat").read_text()
    assert "device='cpu'" in told
    cache = f"{tmp_path / 'cache'}, 1000000"
    assert str({"memory://out": "token", "schemes": "sftp", "cache": cache}) in told


def test_stores_that_a_worker_cannot_open_again_put_it_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are opened through the cache, but for those that are to be read but once."""
    monkeypatch.delenv(named_paths.VARIABLE, raising=False)
    store, _ = random_store(tmp_path / "s.zarr", rows=4, shard_rows=4)
    once = Store(store.path, cached=False)
    assert [pickle.loads(pickle.dumps(one)).cached for one in (store, once)] == [True, False]
    worker = ray_shards._Worker(pickle.dumps(store), Seat(), "", {}, (None, None))
    shutil.move(store.path, tmp_path / "moved.zarr")
    with pytest.raises(UnreadableError, match=r"s\.zarr.*(?s:.*)let every machine of the cluster see the same files"):
        worker.open()


def test_a_unit_whose_worker_is_lost_is_done_by_another(one_ray: None, tmp_path: Path) -> None:
    notes = list[str]()
    done = dict(on_ray(2)(Squares(tmp_path, deadly=1), range(4), notes.append))
    assert sorted(done) == [0, 1, 2, 3]
    assert notes == ["shard 1 lost its worker: it is done again"]


def test_a_unit_that_loses_three_workers_ends_the_work(tmp_path: Path) -> None:
    """Actors that never ran do not count: Ray had not heard yet that their node is lost."""
    found, notes = supervisor(tmp_path)
    never = RayActorError(error_msg="The actor never ran - it was cancelled before it started running.")
    died = RayActorError(error_msg="The actor died unexpectedly.")
    for error in (never, died, never, never, died):
        found._replace(1, error)
    assert found._pending[-5:] == [1] * 5
    assert notes == ["shard 1 lost its worker: it is done again"] * 2
    with pytest.raises(StoreError, match=r"^shard 1 lost its worker 3 times: The actor died(?s:.*)see the worker"):
        found._replace(1, died)


@pytest.mark.slow
def test_an_error_that_the_user_can_mend_arrives_as_it_was(one_ray: None, tmp_path: Path) -> None:
    """What came before it is there."""
    done = list[int]()
    with pytest.raises(UnreadableError, match=r"^2 cannot be read") as caught:
        done.extend(unit for unit, _ in on_ray(1)(Squares(tmp_path, unreadable=2), range(4)))
    assert caught.value.remedy == "mount it"


def test_a_worker_that_cannot_read_is_put_aside_until_another_machine_cannot_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def from_host(host: str) -> UnreadableError:
        error = UnreadableError("a.zarr cannot be read")
        error.host = host
        return error

    monkeypatch.setattr(ray_shards, "machines", lambda: 2)
    two, notes = supervisor(tmp_path)
    two._pending = []
    two._put_aside(0, from_host("a"))
    two._put_aside(1, from_host("a"))
    assert two._pending == [0, 1]
    assert notes == ["a: a.zarr cannot be read; its worker is put aside, and the others go on"] * 2
    with pytest.raises(UnreadableError, match=r"a\.zarr cannot be read"):
        two._put_aside(1, from_host("b"))
    monkeypatch.setattr(ray_shards, "machines", lambda: 1)
    with pytest.raises(UnreadableError, match=r"a\.zarr cannot be read"):
        supervisor(tmp_path)[0]._put_aside(0, from_host("a"))


def test_more_workers_than_ray_has_room_for_are_refused(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ray_cluster.ray.cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(DimefmError, match=r"2 workers need 2 CPUs, and Ray has 1(?s:.*)--workers 1"):
        list(on_ray(2)(Squares(tmp_path), range(4)))
    with pytest.raises(DimefmError, match=r"--device cuda: Ray has no GPU"):
        list(on_ray(1, device="cuda")(Squares(tmp_path), range(4)))


def test_nothing_is_opened_for_no_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_shards, "cluster", lambda *_: pytest.fail("Ray was started for nothing"))
    for run in (run_here, on_ray(2)):
        found: Iterator[Any] = run(Squares(tmp_path), [])
        assert list(found) == []
    assert not list(tmp_path.iterdir())


def test_parts_of_an_index_are_those_of_one_process(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.retrieval.choose_index._PART_ROWS", (512, 512))
    monkeypatch.setattr("dimefm.retrieval.recall.QUERIES", 20)
    store, _ = random_store(tmp_path / "t.zarr", rows=1500, shard_rows=512, kind="text")
    files = []
    for name, run in (("here", run_here), ("ray", on_ray(2))):
        config = IndexConfig(store=store.path, out=str(tmp_path / name), factory="IVF16,SQ8", recall_target=0.5)
        build_index(config, run)
        files.append((tmp_path / name / read_sidecar(config.out).file).read_bytes())
    assert files[0] == files[1]


# -- retrieve ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dying:
    """Other work, whose worker dies at its third unit, once, before it or after it."""

    work: Any
    folder: Path
    after: bool

    def open(self, seat: Seat) -> Callable[[Any], Any]:
        do = self.work.open(seat)

        def dying(unit: Any) -> Any:
            dead = self.folder / "dead"
            now = unit.shards[0] == 2 and not dead.exists()
            if now and not self.after:
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            result = do(unit)
            if now:
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return dying

    def name(self, unit: Any) -> str:
        return str(self.work.name(unit))


@pytest.mark.parametrize(("exact", "after"), [(False, False), pytest.param(True, True, marks=pytest.mark.slow)])
def test_pairs_are_those_of_one_process_though_a_worker_is_lost(
    one_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exact: bool,
    after: bool,
) -> None:
    monkeypatch.setattr("dimefm.retrieval.retrieve_shards._LEAST", 1)
    texts, _ = random_store(tmp_path / "t.zarr", rows=600, shard_rows=256, kind="text", seed=1)
    images, _ = random_store(tmp_path / "i.zarr", rows=90, shard_rows=16, failed=(3, 40), seed=2)
    index = None if exact else str(tmp_path / "t.index")
    if index:
        build_index(IndexConfig(store=texts.path, out=index, factory="IVF8,PQ8x4fs", recall_target=0.3))

    def run(work: Any, units: Any, say: Any, *, memory: int) -> Iterator[Any]:
        return on_ray(2)(Dying(work, tmp_path, after), units, say, memory=memory)

    found = [
        retrieve(images.path, texts.path, top_k=4, index=index, out=str(tmp_path / name), run=runner)
        for name, runner in (("here.zarr", run_here), ("ray.zarr", run))
    ]
    assert "shard 2 lost its worker: it is done again" in capsys.readouterr().err
    assert found[0] == found[1]
    here, there = (files_but_commits(tmp_path / name) for name in ("here.zarr", "ray.zarr"))
    assert len(here) == 4 + 6 + 6 + 1
    assert here == there
    commits = [[commit_facts(path) for path in sorted((tmp_path / name / "commits").glob("0*"))]
               for name in ("here.zarr", "ray.zarr")]  # fmt: skip
    assert commits[0] == commits[1]


def files_but_commits(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "commits"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def commit_facts(path: Path) -> dict[str, Any]:
    """What a commit says of its rows, not of the run."""
    facts = json.loads(path.read_text())
    names = ("shard", "start", "stop", "counts", "failures", "digest", "device", "images")
    return {name: facts[name] for name in names}


def test_workers_that_do_not_fit_into_memory_are_refused(one_ray: None, tmp_path: Path) -> None:
    """As where each has an index open."""
    with pytest.raises(DimefmError, match=r"2 workers need 1000\.0 TB of memory each, and Ray has room for 0\n"):
        list(on_ray(2)(Squares(tmp_path), range(4), memory=10**15))
