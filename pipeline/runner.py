"""Ray places and supervises: one actor per device, one shard at a time each, lost shards done again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from cache_schemas import Commit
from dimefm import storage
from dimefm.clip import Precision, load_clip
from dimefm.errors import DimefmError, MismatchError, StoreError
from dimefm.progress import Progress
from dimefm.store import Store
from pipeline.shard import check_canary, encode_shard

_TRIES = 3
_OBJECT_STORE_BYTES = 100 * 1024**2  # only shard numbers and commits pass through it
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # the default of 15 starves workers on a loaded machine
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know: the planned store and how to load its teacher."""

    store: str
    teacher: str
    pretrained: str | None
    precision: Precision
    device: str
    threads: int | None


class Worker:
    """One teacher on one device. Plain Python: Ray makes actors of it, tests and benchmarks call it as it is."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rows = 0

    def start(self, threads: int) -> None:
        """Load the teacher, and decode on `threads`. Not in __init__, whose errors Ray would not hand on as they are.

        The teacher itself computes on one thread on a CPU: sums come out differently on more, and a run that goes on
        with other workers must write the same bytes. Several workers of one thread are faster than one of several.
        """
        torch.set_num_threads(1)
        job, self._threads, self._store = self._job, threads, Store(self._job.store)
        self._clip = load_clip(job.teacher, job.pretrained, precision=job.precision, device=job.device)
        differences = self._store.schema.teacher.differences(self._clip.identity)
        if differences:
            what = f"{job.teacher} is not the teacher of {job.store}: {'; '.join(differences)}"
            raise MismatchError(what, remedy="name the teacher that the store was begun with")

    def check(self) -> None:
        """The canary; see pipeline.shard.check_canary."""
        check_canary(self._store, self._clip)

    def encode(self, shard: int) -> Commit:
        """Encode and commit one shard."""
        return encode_shard(self._store, shard, self._clip, threads=self._threads, progress=self._count)

    def rows(self) -> int:
        """Rows encoded since this worker started."""
        return self._rows

    def _count(self, rows: int) -> None:
        self._rows += rows


def run_shards(job: Job, *, workers: int, address: str | None = None) -> None:
    """Encode every shard of the store that has no commit, on `workers` actors, on a cluster or a local Ray.

    Raises DimefmError where there are not that many GPUs or cores, StoreError when a shard loses its worker three
    times, and what a worker raised.
    """
    store = Store(job.store)
    schema = store.schema
    committed = store.committed()
    pending = [shard for shard in range(schema.shards) if shard not in committed]
    done = schema.rows - sum(stop - start for start, stop in map(schema.shard_range, pending))
    if not pending:
        return
    storage.remove_leftovers(store.path)
    with cluster(address, workers, job.device), Progress(schema.kind + "s", schema.rows, schema.kind, done) as progress:
        workers = min(workers, len(pending))
        cores = _require_room(workers, job.device)
        cores = cores if address else cpus()  # a local Ray is told of one core a worker, whatever there are
        threads = job.threads or max(1, cores // workers)
        _Supervisor(job, workers, threads, check=bool(committed)).run(pending, progress, done)


def _require_room(workers: int, device: str) -> int:
    """CPU cores of the Ray that is running. Raises DimefmError where it could never place so many workers."""
    kind = "GPU" if device.startswith("cuda") else "CPU"
    resources = ray.cluster_resources()
    have = int(resources.get(kind, 0))
    if workers > have:
        raise DimefmError(f"{workers} workers need {workers} {kind}s, and Ray has {have}", remedy=f"--workers {have}")
    return int(resources["CPU"])


def cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Supervisor:
    """Hands out shards, one in flight per actor, and replaces actors that are lost."""

    def __init__(self, job: Job, workers: int, threads: int, *, check: bool) -> None:
        gpus = 1 if job.device.startswith("cuda") else 0
        # Two threads of an actor: one works on a shard while the other answers how far it is.
        actor: Any = ray.remote(Worker)
        actor = actor.options(num_cpus=1, num_gpus=gpus, max_concurrency=2)
        self._place: Callable[[], Any] = lambda: actor.remote(job)
        self._threads = threads
        self._actors: list[Any] = [self._place() for _ in range(workers)]
        for started in [actor.start.remote(threads) for actor in self._actors]:
            _get(started)
        self._tries: dict[int, int] = {}
        if check:
            _get(self._actors[0].check.remote())

    def run(self, pending: list[int], progress: Progress, done: int) -> None:
        pending = list(reversed(pending))
        finished = done
        counted: dict[Any, int] = dict.fromkeys(self._actors, 0)
        flying: dict[Any, tuple[Any, int]] = {}
        while pending or flying:
            busy = {actor for actor, _ in flying.values()}
            for actor in self._actors:
                if actor not in busy and pending:
                    shard = pending.pop()
                    flying[actor.encode.remote(shard)] = (actor, shard)
            ready, _ = ray.wait(list(flying), timeout=1.0)
            for reference in ready:
                actor, shard = flying.pop(reference)
                try:
                    _get(reference)
                except RayActorError as error:
                    pending.append(self._again(shard, error))
                    finished += counted.pop(actor, 0)
                    self._actors[self._actors.index(actor)] = self._replacement()
            self._poll(counted)
            progress.at(finished + sum(counted.values()))

    def _replacement(self) -> Any:
        actor = self._place()
        _get(actor.start.remote(self._threads))
        return actor

    def _poll(self, counted: dict[Any, int]) -> None:
        asked = {actor.rows.remote(): actor for actor in self._actors}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.5)
        for reference in ready:
            try:
                counted[asked[reference]] = ray.get(reference)
            except RayActorError:
                continue  # its shard comes back with the same error, which is handled there

    def _again(self, shard: int, error: RayActorError) -> int:
        self._tries[shard] = self._tries.get(shard, 0) + 1
        if self._tries[shard] >= _TRIES:
            reason = str(error).strip().split("\n")[0]
            what = f"shard {shard} lost its worker {_TRIES} times: {reason}"
            raise StoreError(what, remedy="see the worker's log, mend the cause (often memory), and run again")
        return shard


def _get(reference: Any) -> Any:
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
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
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
