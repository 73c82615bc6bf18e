"""Stage 1 on a cluster of several machines: Ray's own simulation of one, a node of one CPU a machine, real processes.

Nodes are lost in the middle of the work by SIGKILL of all their processes, while a gate holds their workers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.cli import cli
from dimefm.errors import DimefmError, StoreError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.system.progress import Progress
from pipeline.ray_cluster import _ENVIRONMENT, _closed_to_others, cluster
from pipeline.ray_workers import Job, _Supervisor
from tests.making import make_jpeg
from tests.processes import MARK, Command, Gate, processes

_NODE = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
_IMAGES, _SHARDS = 12, 6


class Machines:
    """A cluster whose head does no work, and the nodes that do."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_NODE})
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []

    def have(self, count: int) -> None:
        """Add nodes until there are so many."""
        while len(self.nodes) < count:
            self.nodes.append(self._cluster.add_node(num_cpus=1, **_NODE))
        self._cluster.wait_for_nodes()

    def lose(self, count: int) -> None:
        for _ in range(count):
            self._cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Of all machines."""
    return Gate(tmp_path_factory.mktemp("cluster") / "gate")


@pytest.fixture(scope="module")
def machines(gate: Gate) -> Iterator[Machines]:
    """Closed to others, as a local Ray is; the commands that join it read that from their environment."""
    here = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with _closed_to_others(), pytest.MonkeyPatch.context() as patch:
        for name, value in {**_ENVIRONMENT, **MARK, **gate.environment, **here}.items():
            patch.setenv(name, value)
        found = Machines()
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "images"
    folder.mkdir()
    for row in range(_IMAGES):
        (folder / f"{row:03d}.jpg").write_bytes(make_jpeg((60 + row, 50), seed=row))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, clip: Clip) -> Store:
    """What one process makes of it."""
    request = PlanRequest(kind="image", arguments=(str(source),), shard_rows=_IMAGES // _SHARDS, batch_size=2)
    store = open_or_plan(request, str(source.with_name("undisturbed.zarr")), clip.identity)
    for shard in range(_SHARDS):
        encode_shard(store, shard, clip)
    return store


@pytest.fixture
def words(source: Path, teacher_name: str, tmp_path: Path) -> list[str]:
    sizes = ["--shard-rows", str(_IMAGES // _SHARDS), "--batch-size", "2", "--device", "cpu", "--threads", "1"]
    return ["cache-images", str(source), "--teacher", teacher_name, *sizes, "--out", str(tmp_path / "images.zarr")]


@contextmanager
def running(words: list[str], machines: Machines, workers: int) -> Iterator[Command]:
    """The command at work on the cluster."""
    command = Command([*words, "--ray-address", machines.address, "--workers", str(workers)])
    yield command
    command.kill()


def commits(words: list[str]) -> dict[Path, int]:
    """When each was written."""
    return {path: path.stat().st_mtime_ns for path in (Path(words[-1]) / "commits").glob("*.json")}


def assert_as_undisturbed(out: Path, undisturbed: Store) -> None:
    store = Store(str(out))
    store.require_complete()
    np.testing.assert_array_equal(store.read(0, _IMAGES), undisturbed.read(0, _IMAGES))
    np.testing.assert_array_equal(store.status(), undisturbed.status())


@pytest.mark.slow
def test_lost_machines_are_not_waited_for_and_work_goes_on_when_one_comes(
    machines: Machines, words: list[str], undisturbed: Store, gate: Gate
) -> None:
    """Of two the second does what is left; and it is lost too, at the last shard."""
    machines.have(2)
    gate.close(at="open *.jpg")
    with running(words, machines, workers=2) as command:
        command.wait_until(lambda: len(gate.waiting()) == 2)
        machines.lose(1)
        gate.close(at=f"open *{_IMAGES - 2:03d}.jpg")
        command.wait_until(gate.waiting)
        before = commits(words)
        assert len(before) >= _SHARDS - 2, "all but the last and what the first was at"
        machines.lose(1)
        command.wait_until(lambda: not processes("ray::Worker"))
        gate.open()
        machines.have(1)
        command.finish()
    assert_as_undisturbed(Path(words[-1]), undisturbed)
    assert before.items() <= commits(words).items(), "a finished shard was done again"


@pytest.mark.slow
def test_a_node_that_is_lost_during_the_canary_is_replaced(
    machines: Machines, words: list[str], undisturbed: Store, gate: Gate
) -> None:
    """The first worker of a run that goes on is alone until it has compared: its loss must not end the run."""
    out = Path(shutil.copytree(undisturbed.path, words[-1]))
    for shard in range(2, _SHARDS):
        (out / "commits" / f"{shard:06d}.json").unlink()
    machines.have(1)
    machines.lose(len(machines.nodes) - 1)
    gate.close(at="open *.jpg")
    with running(words, machines, workers=1) as command:
        command.wait_until(gate.waiting)
        machines.lose(1)
        gate.open()
        machines.have(1)
        command.finish()
    assert_as_undisturbed(out, undisturbed)


def test_an_address_at_which_nothing_listens_is_refused_at_once(words: list[str]) -> None:
    result = CliRunner().invoke(cli, [*words, "--ray-address", "127.0.0.1:9", "--workers", "1"])
    assert result.exit_code == 1
    assert re.search(
        r"^Error: no Ray cluster answers at 127\.0\.0\.1:9: .*refused\n"
        r"  remedy: start one with ray start --head, or leave --ray-address out\n\Z",
        result.output,
        re.MULTILINE,
    )


@pytest.mark.parametrize(
    ("address", "raised", "told"),
    [
        (
            None,
            "The current node timed out during startup. This could",
            r"not up after 30 seconds(?s:.*)remedy: .* --workers 1, which",
        ),
        (None, "", r"Ray does not start: Exception\(''\)\n  remedy: see"),
        (
            "auto",
            "Version mismatch: The cluster was started with:\n    Ray: 1.0",
            "auto cannot be joined: .* with: Ray: 1.0\n  remedy: all",
        ),
    ],
)
def test_a_plain_exception_of_ray_becomes_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, address: str | None, raised: str, told: str
) -> None:
    def init(**_: object) -> None:
        raise Exception(raised)  # what Ray raises

    monkeypatch.setattr("pipeline.ray_cluster.ray.init", init)
    with pytest.raises(DimefmError, match=told), cluster(address, 1, "cpu"):
        pass


def supervisor(monkeypatch: pytest.MonkeyPatch, message: str) -> _Supervisor:
    """One whose actors are all lost as they start."""

    def lost(reference: object) -> None:
        raise RayActorError(error_msg=message)

    start = SimpleNamespace(remote=lambda *_, **__: object())
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: type("Actor", (), {"start": start})()))
    monkeypatch.setattr("pipeline.ray_workers.ray.remote", lambda _: made)
    monkeypatch.setattr("pipeline.ray_workers.fetch", lost)
    job = Job(store="s.zarr", teacher="t", pretrained=None, precision="fp32", device="cpu", threads=1)
    found = _Supervisor(job, 1, 1, {0: 4}, check=False)
    found._start_actor()
    return found


def test_actors_that_never_ran_are_placed_again_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as Ray does not know that a node is lost, it sends actors to it."""
    found = supervisor(monkeypatch, "The actor never ran - it was cancelled before it started running.")
    progress = Progress("images", 4, "image")
    for _ in range(20):
        found._settle(next(iter(found._in_flight)), progress)


def test_actors_that_are_lost_while_they_start_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found, progress = supervisor(monkeypatch, "The actor died unexpectedly."), Progress("images", 4, "image")
    for _ in range(2):
        found._settle(next(iter(found._in_flight)), progress)
    with pytest.raises(StoreError, match="a worker was lost while it started 3 times: The actor died unexpectedly"):
        found._settle(next(iter(found._in_flight)), progress)


def test_an_actor_that_is_lost_with_two_shards_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, progress = supervisor(monkeypatch, "The actor died unexpectedly."), Progress("images", 4, "image")
    found._in_flight.clear()
    found._pending.clear()
    found._rows = {0: 4, 1: 4}
    actor = found._new_actor()
    found._running[actor] = 2
    found._in_flight = {"one": (actor, 0), "other": (actor, 1)}
    assert [found._settle(name, progress) for name in ("one", "other")] == [0, 0]
    assert found._pending == [0, 1]
    assert [shard for _, shard in found._in_flight.values()] == [None]
    assert not found._running


def test_a_second_shard_is_for_an_actor_only_while_there_are_more_than_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = supervisor(monkeypatch, "")
    found._workers, found._at_once = 2, 2
    found._running, found._pending = {"a": 1, "b": 0}, [5, 4, 3]
    assert found._free_actor() == "b"
    found._running["b"] = 1
    assert found._free_actor() in ("a", "b")
    found._pending.pop()
    assert found._free_actor() is None  # the two that are left are for whichever is done first
    found._running["a"] = 0
    assert found._free_actor() == "a"
    found._pending.clear()
    assert found._free_actor() is None
