"""Ray places and supervises: one actor per device, one shard at a time each, lost shards done again."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from cache_schemas import Commit, Status
from dimefm import storage
from dimefm.clip import load_clip
from dimefm.errors import DimefmError, MismatchError, SourceError, StoreError
from dimefm.machine import Precision, cpus
from dimefm.progress import Progress
from dimefm.shard import check_canary, encode_shard, retry_shard
from dimefm.store import Store
from pipeline.probe import PROBE_ROWS, measure

_TRIES = 3
_PATIENCE = 60.0  # seconds without any worker before that is said
_OBJECT_STORE_BYTES = 100 * 1024**2  # only shard numbers and commits pass through it
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # the default of 15 starves workers on a loaded machine
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know: the planned store and how to load its teacher. `retry`: encode only the rows
    of finished shards that have no embedding."""

    store: str
    teacher: str
    pretrained: str | None
    precision: Precision
    device: str
    threads: int | None
    compile: bool = False
    retry: bool = False


class Worker:
    """One teacher on one device. Plain Python: Ray makes actors of it, tests and benchmarks call it as it is."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rows = 0

    def start(self, threads: int, shard: int, check: bool = False) -> None:
        """Load the teacher, and decode on up to `threads`: as many as its speed needs, measured on rows of `shard`.
        With `check`, go through the canary (see dimefm.shard.check_canary). Not in __init__, whose errors Ray would
        not hand on as they are.

        The teacher itself computes on one thread on a CPU: sums come out differently on more, and a run that goes on
        with other workers must write the same bytes. Several workers of one thread are faster than one of several.
        """
        torch.set_num_threads(1)
        job, self._store = self._job, Store(self._job.store)
        schema = self._store.schema
        self._clip = load_clip(job.teacher, job.pretrained, precision=job.precision, device=job.device)
        differences = schema.teacher.differences(self._clip.identity)
        if differences:
            what = f"{job.teacher} is not the teacher of {job.store}: {'; '.join(differences)}"
            raise MismatchError(what, remedy="name the teacher that the store was begun with")
        if job.compile:
            self._clip.compile(schema.batch_size)
        self._threads = threads
        if job.threads is None and threads > 1 and schema.kind == "image" and not job.retry:
            rows = self._store.plan(shard).slice(0, PROBE_ROWS).to_pylist()
            with suppress(SourceError):  # not one image can be read: there is no speed to go by
                self._threads = measure(rows, schema, self._clip).threads(threads)
        if check:
            check_canary(self._store, self._clip)

    def encode(self, shard: int) -> Commit:
        """Encode and commit one shard."""
        self._rows = 0
        work = retry_shard if self._job.retry else encode_shard
        return work(self._store, shard, self._clip, threads=self._threads, progress=self._count)

    def rows(self) -> int:
        """Rows of the present shard that are encoded."""
        return self._rows

    def _count(self, rows: int) -> None:
        self._rows += rows


def run_shards(job: Job, *, workers: int, address: str | None = None) -> None:
    """Encode every shard of the store that has no commit (or, to retry, that has failed rows) on `workers` actors, on
    a cluster or a local Ray.

    Raises DimefmError where there are not that many GPUs or cores, StoreError when a shard loses its worker three
    times, and what a worker raised.
    """
    store = Store(job.store)
    pending = _pending(store, retry=job.retry)
    rows = sum(pending.values())
    if not pending:
        return
    storage.remove_leftovers(store.path)
    total, done = (rows, 0) if job.retry else (store.schema.rows, store.schema.rows - rows)
    kind = store.schema.kind
    with cluster(address, workers, job.device), Progress(kind + "s", total, kind, done) as progress:
        check = bool(store.committed())
        workers = min(workers, len(pending))
        cores = _require_room(workers, job.device)
        cores = cores if address else cpus()  # a local Ray is told of one core a worker, whatever there are
        threads = job.threads or max(1, cores // workers)
        _Supervisor(job, workers, threads, pending, check=check).run(progress, done)


def _pending(store: Store, *, retry: bool) -> dict[int, int]:
    """The shards to do, and how many rows of each."""
    schema = store.schema
    if retry:
        failed = {c.shard: c.stop - c.start - c.counts.get(Status.OK.name, 0) for c in store.commits()}
        return {shard: count for shard, count in failed.items() if count}
    committed = store.committed()
    ranges = {shard: schema.shard_range(shard) for shard in range(schema.shards) if shard not in committed}
    return {shard: stop - start for shard, (start, stop) in ranges.items()}


def _require_room(workers: int, device: str) -> int:
    """CPU cores of the Ray that is running. Raises DimefmError where it could never place so many workers."""
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if device.startswith("cuda") and gpus == 0:
        raise DimefmError(
            "--device cuda: Ray has no GPU", remedy="start Ray where there are some, or give --device cpu"
        )
    if workers > cores:
        raise DimefmError(f"{workers} workers need {workers} CPUs, and Ray has {cores}", remedy=f"--workers {cores}")
    return cores


def _gpu_share(workers: int, device: str) -> float:
    """GPUs of one worker: one, or a share where there are more workers than GPUs (several then feed one)."""
    gpus = ray.cluster_resources().get("GPU", 0) if device.startswith("cuda") else 0
    return 1 if gpus >= workers else 1 / math.ceil(workers / gpus) if gpus else 0


class _Supervisor:
    """Hands out shards, one in flight per actor, and replaces actors that are lost.

    A replacement that Ray cannot place yet, as after a node is lost, is not waited for: the others go on. With `check`,
    one actor goes through the canary before there are others.
    """

    def __init__(self, job: Job, workers: int, threads: int, pending: dict[int, int], *, check: bool) -> None:
        # Two threads of an actor: one works on a shard while the other answers how far it is.
        actor: Any = ray.remote(Worker)
        actor = actor.options(num_cpus=1, num_gpus=_gpu_share(workers, job.device), max_concurrency=2)
        self._new: Callable[[], Any] = lambda: actor.remote(job)
        self._workers, self._threads, self._check = workers, threads, check
        self._rows, self._pending = dict(pending), sorted(pending, reverse=True)
        self._tries: dict[int | None, int] = {}
        self._flying: dict[Any, tuple[Any, int | None]] = {}  # reference: actor, its shard; None while it starts
        self._idle: list[Any] = []
        self._counted: dict[Any, int] = {}

    def run(self, progress: Progress, finished: int) -> None:
        """Until every shard is committed; `finished` rows are already."""
        for _ in range(1 if self._check else self._workers):
            self._place()
        heard = time.monotonic()
        while self._pending or any(shard is not None for _, shard in self._flying.values()):
            while self._pending and self._idle:
                actor, shard = self._idle.pop(), self._pending.pop()
                self._flying[actor.encode.remote(shard)] = (actor, shard)
            ready, _ = ray.wait(list(self._flying), timeout=1.0)
            for reference in ready:
                finished += self._landed(reference)
            busy = any(shard is not None for _, shard in self._flying.values())
            heard = time.monotonic() if busy or ready else heard
            if time.monotonic() - heard > _PATIENCE:
                heard = time.monotonic()
                progress.note("no worker runs: Ray has no node with room for one, or it is still loading the teacher")
            self._poll()
            progress.at(finished + sum(self._counted.values()))

    def _place(self) -> None:
        actor = self._new()
        shard = self._pending[-1] if self._pending else 0
        self._flying[actor.start.remote(self._threads, shard, self._check)] = (actor, None)

    def _landed(self, reference: Any) -> int:
        """An actor has started, finished its shard, or is lost; the rows that are done with that."""
        actor, shard = self._flying.pop(reference)
        self._counted.pop(actor, None)
        try:
            fetch(reference)
        except RayActorError as error:
            if "never ran" not in str(error):  # Ray sent it to a node that was lost already, and did not know yet
                self._count_loss(shard, error)
            if shard is not None:
                self._pending.append(shard)
            self._place()
            return 0
        self._idle.append(actor)
        self._tries.pop(None, None)
        if self._check:
            self._check = False
            for _ in range(self._workers - 1):
                self._place()
        return 0 if shard is None else self._rows[shard]

    def _poll(self) -> None:
        asked = {actor.rows.remote(): actor for actor, shard in self._flying.values() if shard is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.5) if asked else ([], [])
        for reference in ready:
            try:
                self._counted[asked[reference]] = ray.get(reference)
            except RayActorError:
                continue  # its shard comes back with the same error, which is handled there

    def _count_loss(self, shard: int | None, error: RayActorError) -> None:
        self._tries[shard] = self._tries.get(shard, 0) + 1
        if self._tries[shard] >= _TRIES:
            lines = str(error).strip().split("\n")  # of an error in its own code, what was raised comes last
            reason = lines[-1] if "creation task" in lines[0] else lines[0]
            lost = f"shard {shard} lost its worker" if shard is not None else "a worker was lost while it started"
            remedy = "see the worker's log, mend the cause (often memory), and run again"
            raise StoreError(f"{lost} {_TRIES} times: {reason}", remedy=remedy)


def fetch(reference: Any) -> Any:
    """ray.get, with an error of ours raised as it was rather than wrapped in Ray's."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DimefmError):
            raise error.cause from None
        raise


@contextmanager
def cluster(address: str | None, workers: int, device: str) -> Iterator[None]:
    """A Ray to run on: the cluster at `address`, or a small local one that ends with the block."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address:
        try:
            _require_answer(address)
            ray.init(address=address, log_to_driver=False)
        except OSError as error:
            remedy = "start one with ray start --head, or leave --ray-address out"
            raise DimefmError(f"no Ray cluster answers at {address}: {error}", remedy=remedy) from None
    else:
        ray.init(
            address="local",
            num_cpus=workers,
            num_gpus=torch.cuda.device_count() if device.startswith("cuda") else 0,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT. Ray alone would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
