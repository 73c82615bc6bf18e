"""Runs work on shards on Ray: `retrieve`, parts of an index, and every other command with --workers but stage 1's own.

The interface is that of `dimefm.system.shard_work`: the work is a picklable object that each worker process opens once
and then calls per unit, and `on_ray(workers, address, device)` is a `ShardRunner` for it. What it does:

- A worker is an actor with one unit at a time; units begin in the order in which they are given, and each is yielded
  with its result when it is finished. The driver holds as many results as there are workers, at most.
- A worker's seat has its part of the cores as threads, and of the GPUs where `device` is cuda: one, or a share of one.
  Ray lets a worker's libraries start with one thread: the work sets the seat's number (torch, FAISS) as it is opened.
- `memory`, which the caller says of its work, is set aside for each worker: where Ray has too little, it is refused.
- A lost worker's unit is done again by another, up to three times. A replacement that Ray cannot place yet, as after a
  node was lost, is not waited for: the other workers go on.
- A worker that raises UnreadableError, as on a machine without the mount, is put aside while others can read.
- Workers write under the leases of the command, may open the URL schemes that the user allows, and read through its
  cache: the same folder on each machine.
- Errors that the user can mend arrive as they were raised.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from dimefm.errors import UnreadableError
from dimefm.store.reopen import reopening
from dimefm.system import lease, named_paths
from dimefm.system.file_cache import active, caching_in
from dimefm.system.machine import choose_device, cpus
from dimefm.system.notes import note
from dimefm.system.shard_work import Seat, ShardRunner, ShardWork
from pipeline.ray_cluster import cluster, fetch, gpu_share, machines, ready, require_room
from pipeline.ray_losses import LOST, PATIENCE, Losses, never_ran


def on_ray(workers: int, address: str | None = None, device: str | None = "cpu") -> ShardRunner:
    """Have work done on Ray by this number of workers: on a cluster that sees the same files, or on a local Ray of this
    command. `device` None: on GPUs where Ray has some.

    What it runs raises DimefmError where Ray has too few GPUs or cores, StoreError where a unit loses its worker three
    times, and whatever a worker raised.
    """

    def run(
        work: ShardWork[Any, Any], units: Sequence[Any], say: Callable[[str], None] = note, *, memory: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        if not units:
            return
        count = min(workers, len(units))
        with cluster(address, count, device or choose_device(None)):
            gpus = gpu_share(count, device or "cuda")
            on = device or ("cuda" if gpus else "cpu")
            cores = require_room(count, on, memory)
            cores = cores if address else cpus()  # a local Ray knows of one core per worker, however many there are
            seat = Seat(max(1, cores // count), on)
            actor: Any = ray.remote(_Worker)
            # Spread: else Ray would fill one node with workers that each have the threads of a whole one.
            actor = actor.options(num_cpus=1, num_gpus=gpus, memory=memory or None, scheduling_strategy="SPREAD")
            cache = (str(found.folder), found.limit) if (found := active()) else (None, None)
            new_actor = _bound(actor, pickle.dumps(work), seat, named_paths.allowed(), lease.held(), cache)
            yield from _Supervisor(new_actor, count, work, units, say).run()

    return run


def _bound(actor: Any, *words: Any) -> Callable[[], Any]:
    return lambda: actor.remote(*words)


class _Worker:
    """What runs in a process of its own: the work, opened once."""

    def __init__(
        self, work: bytes, seat: Seat, schemes: str, leases: dict[str, str], cache: tuple[str | None, int | None]
    ) -> None:
        self._work, self._seat, self._cache = work, seat, cache
        named_paths.allow(schemes)
        for store, token in leases.items():
            lease.writes_under(store, token)

    def open(self) -> None:
        """Open the work, and the stores in it. This is not in __init__, because Ray would wrap the errors of that."""
        self._until_the_end = ExitStack()
        self._until_the_end.enter_context(caching_in(*self._cache))
        with reopening():
            work: ShardWork[Any, Any] = pickle.loads(self._work)
        self._do = work.open(self._seat)

    def do(self, unit: Any) -> Any:
        return self._do(unit)


class _Supervisor:
    """Hands out units, one at a time to each actor, and replaces actors that are lost. Units are known by their places
    in `units`. `pipeline.ray_workers` has the one of stage 1, which knows of images that crash."""

    def __init__(
        self,
        new_actor: Callable[[], Any],
        workers: int,
        work: ShardWork[Any, Any],
        units: Sequence[Any],
        say: Callable[[str], None],
    ) -> None:
        self._new_actor, self._workers, self._work, self._units, self._say = new_actor, workers, work, units, say
        self._pending = list(reversed(range(len(units))))
        self._in_flight: dict[Any, tuple[Any, int | None]] = {}  # by reference: actor, its unit; None while it opens
        self._free: list[Any] = []  # actors that are open and have no unit
        self._losses = Losses()
        self._aside = 0  # actors that could not read
        self._unread: dict[int, str] = {}  # by unit that could not be read: the machine

    def run(self) -> Iterator[tuple[Any, Any]]:
        """Go on until every unit is done; yields each with its result."""
        for _ in range(self._workers):
            self._start_actor()
        heard = time.monotonic()
        while self._pending or self._busy():
            while self._pending and self._free:
                actor, unit = self._free.pop(), self._pending.pop()
                self._in_flight[actor.do.remote(self._units[unit])] = (actor, unit)
            done = ready(self._in_flight, 1.0)
            for reference in done:
                yield from self._settle(reference)
            heard = time.monotonic() if done or self._busy() else heard
            if time.monotonic() - heard > PATIENCE:
                heard = time.monotonic()
                self._say("no worker runs: Ray has no node with room for one, or it is still being opened")

    def _busy(self) -> bool:
        return any(unit is not None for _, unit in self._in_flight.values())

    def _start_actor(self) -> None:
        actor = self._new_actor()
        self._in_flight[actor.open.remote()] = (actor, None)

    def _settle(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        """Handle what an actor came back with: it is open, has done a unit, which is yielded, cannot read, or is
        lost."""
        actor, unit = self._in_flight.pop(reference)
        try:
            result = fetch(reference)
        except LOST as error:
            self._replace(unit, error)
            return
        except UnreadableError as error:
            self._put_aside(unit, error)
            return
        self._free.append(actor)
        if unit is None:
            self._losses.started()
        else:
            yield self._units[unit], result

    def _replace(self, unit: int | None, error: Exception) -> None:
        """Start another actor in place of a lost one, whose unit comes next."""
        if unit is not None:
            self._pending.append(unit)
        if not never_ran(error):
            name = "" if unit is None else self._work.name(self._units[unit])
            self._losses.count(unit, name, error)
            if name:
                self._say(f"{name} lost its worker: it is done again")
        self._start_actor()

    def _put_aside(self, unit: int | None, error: UnreadableError) -> None:
        """Stop using an actor that could not read. Raises `error` where no other could do better: another machine could
        not read for this unit either, or there is no other."""
        elsewhere = unit is not None and self._unread.setdefault(unit, error.host) != error.host
        if unit is not None:
            self._pending.append(unit)
        self._aside += 1
        if elsewhere or self._aside >= self._workers or machines() == 1:
            raise error
        self._say(f"{error.host}: {error.what}; its worker is put aside, and the others go on")
