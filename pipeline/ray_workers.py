"""Encodes the shards of a store on Ray: actors that take shards, and a supervisor that replaces those that are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from dimefm.caching.worker import SHARDS_AT_ONCE, Job, Worker, none_usable, pending_shards, progress_of, to_be_checked
from dimefm.errors import UnreadableError
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.machine import cpus
from dimefm.system.progress import Progress
from pipeline.ray_cluster import cluster, fetch, gpu_share, machines, ready, require_room
from pipeline.ray_losses import LOST, PATIENCE, Losses, never_ran

_LOOK = 1.0  # seconds between two looks at how far the workers are


def run_shards(job: Job, *, workers: int, address: str | None = None) -> None:
    """Encode every shard of the store that has no commit (or, to retry, that has failed rows) with `workers` actors, on
    a cluster or on a local Ray.

    A worker that cannot read the source, such as one on a machine without the mount, is put aside as long as others
    can. Raises DimefmError where Ray has too few GPUs or cores, StoreError where a shard loses its worker three times,
    and whatever a worker raised.
    """
    store = Store(job.store, additions=0)
    pending = pending_shards(store, retry=job.retry)
    if not pending:
        return
    storage.remove_leftovers(store.path)
    total, done = progress_of(store, pending, retry=job.retry)
    kind = store.schema.kind
    with cluster(address, workers, job.device), Progress("encoding", total, kind, done) as progress:
        check = to_be_checked(store)
        workers = min(workers, len(pending))
        cores = require_room(workers, job.device)
        cores = cores if address else cpus()  # a local Ray knows of one core per worker, however many there are
        threads = job.threads or max(1, cores // workers)
        _Supervisor(job, workers, threads, pending, check=check).run(progress, done)


class _Supervisor:
    """Hands out shards, one or two at a time to each actor (SHARDS_AT_ONCE), and replaces actors that are lost.

    It does not wait for a replacement that Ray cannot place yet, as after a node is lost: the other actors go on. A
    shard that lost its worker is done again carefully, because an image may have crashed it
    (caching.crashing_images). Actors that cannot read the source are put aside and not replaced, until none is left,
    or a shard could not be read on two machines. With `check` one actor first shows that it encodes as the store was
    encoded; only then the others are started.
    """

    def __init__(self, job: Job, workers: int, threads: int, pending: dict[int, int], *, check: bool) -> None:
        # An actor has a thread for each shard that is under way, and one that answers how far they are.
        self._at_once = SHARDS_AT_ONCE[job.device.partition(":")[0]]
        actor: Any = ray.remote(Worker)
        actor = actor.options(num_cpus=1, num_gpus=gpu_share(workers, job.device), max_concurrency=self._at_once + 1)
        self._new_actor: Callable[[], Any] = lambda: actor.remote(job)
        self._workers, self._threads, self._check = workers, threads, check
        self._rows, self._pending = dict(pending), sorted(pending, reverse=True)
        self._losses = Losses()
        self._in_flight: dict[Any, tuple[Any, int | None]] = {}  # by reference: actor, its shard; None while it starts
        self._running: dict[Any, int] = {}  # by actor that has started: how many shards it has
        self._counted: dict[int, int] = {}  # by shard in flight: how many rows are done
        self._asked, self._last_asked = dict[Any, Any](), 0.0  # by reference: the actor that was asked, and when
        self._noted, self._noted_none_usable = set[str](), False
        self._aside = 0  # actors that could not read the source
        self._unread: dict[int, str] = {}  # by shard that could not be read: the machine

    def run(self, progress: Progress, finished: int) -> None:
        """Go on until every shard is committed; `finished` rows are done already."""
        for _ in range(1 if self._check else self._workers):
            self._start_actor()
        heard = time.monotonic()
        while self._pending or any(shard is not None for _, shard in self._in_flight.values()):
            while (actor := self._free_actor()) is not None:
                shard = self._pending.pop()
                self._running[actor] += 1
                self._in_flight[actor.encode.remote(shard, careful=shard in self._losses)] = (actor, shard)
            done = ready(self._in_flight, _LOOK)
            for reference in done:
                finished += self._settle(reference, progress)
            busy = any(shard is not None for _, shard in self._in_flight.values())
            heard = time.monotonic() if busy or done else heard
            if time.monotonic() - heard > PATIENCE:
                heard = time.monotonic()
                progress.note("no worker runs: Ray has no node with room for one, or it is still loading the teacher")
            self._count_rows()
            progress.at(finished + sum(self._counted.values()))

    def _free_actor(self) -> Any | None:
        """An actor to give the next shard to. One that has a shard gets a second only while there are more shards than
        workers: otherwise one worker could have two shards at the end, and another none."""
        if not self._pending:
            return None
        at_once = self._at_once if len(self._pending) > self._workers else 1
        actor = min(self._running, key=lambda actor: self._running[actor], default=None)
        return actor if actor is not None and self._running[actor] < at_once else None

    def _start_actor(self) -> None:
        actor = self._new_actor()
        shard = self._pending[-1] if self._pending else 0
        started = actor.start.remote(self._threads, shard, self._check, careful=bool(self._losses))
        self._in_flight[started] = (actor, None)

    def _settle(self, reference: Any, progress: Progress) -> int:
        """Handle what an actor came back with: it has started, has finished a shard, cannot read, or is lost. Returns
        the rows that are done with that."""
        actor, shard = self._in_flight.pop(reference)
        if shard is not None:
            self._counted.pop(shard, None)
        try:
            result = fetch(reference)
        except LOST as error:
            self._replace(actor, shard, error, progress)
            return 0
        except UnreadableError as error:
            self._put_aside(actor, shard, error, progress)
            return 0
        if shard is None:
            self._started(actor, result, progress)
            return 0
        if actor in self._running:  # not lost since
            self._running[actor] -= 1
        if self._pending and not self._noted_none_usable and (note := none_usable(result)):
            self._noted_none_usable = True
            progress.note(note)
        return self._rows[shard]

    def _started(self, actor: Any, note: str, progress: Progress) -> None:
        """An actor can take shards; after a first one that was checked, the others are started."""
        self._running[actor] = 0
        self._losses.started()
        if note and note not in self._noted:
            self._noted.add(note)
            progress.note(note)
        if self._check:
            self._check = False
            for _ in range(self._workers - self._aside - 1):
                self._start_actor()

    def _replace(self, actor: Any, shard: int | None, error: Exception, progress: Progress) -> None:
        """Start another actor in place of a lost one, whose shard goes back to those that are pending."""
        if not never_ran(error):
            self._losses.count(shard, f"shard {shard}", error)
            if shard is not None:
                progress.note(f"shard {shard} lost its worker: once more, with a search for images that crash")
        if shard is not None:
            self._pending.append(shard)
        if shard is None or self._running.pop(actor, None) is not None:  # once for all of its shards
            self._start_actor()

    def _put_aside(self, actor: Any, shard: int | None, error: UnreadableError, progress: Progress) -> None:
        """Stop using an actor that could not read the source. Raises `error` where no other could do better:
        another machine could not read the shard either, or there is no other."""
        elsewhere = shard is not None and self._unread.setdefault(shard, error.host) != error.host
        if shard is not None:
            self._pending.append(shard)
        if shard is None or self._running.pop(actor, None) is not None:  # once for all of its shards
            self._aside += 1
            progress.note(f"{error.host}: {error.what}; its worker is put aside, and the others go on")
        if elsewhere or self._aside >= self._workers or machines() == 1:
            raise error
        if self._check:
            self._start_actor()

    def _count_rows(self) -> None:
        """Take what the actors have answered, and ask them about once a second how many rows of their shards are done.
        No answer is waited for: with many workers one of them is always slow."""
        flying = {shard for _, shard in self._in_flight.values()}
        for reference in ready(self._asked, 0):
            del self._asked[reference]
            try:
                rows = ray.get(reference)
            except LOST:
                continue  # its shards come back with the same error, which `_settle` handles
            self._counted |= {shard: count for shard, count in rows.items() if shard in flying}
        if time.monotonic() - self._last_asked >= _LOOK:
            self._last_asked, silent = time.monotonic(), set(self._asked.values())
            busy = [actor for actor, shards in self._running.items() if shards and actor not in silent]
            self._asked |= {actor.rows.remote(): actor for actor in busy}
