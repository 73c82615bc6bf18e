"""What the process of a command costs that gives shards to many workers on Ray, and how long workers wait for it.

Ray and every call are real, and so is the code that gives out shards. The workers are coroutines of a few processes on
one machine, which sleep where they would encode, so that hundreds fit on a small machine: what is not measured is their
own start and work, the network between machines, and what Ray itself does per process.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from benchmarks.measure import machine, table

_CALLS = 10_000  # that a process may have at once
_GOLDEN = 0.618034  # its multiples modulo 1 are spread evenly


class Host:
    """The workers of one process."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._shards, self._ended, self._waits = dict[int, int](), dict[int, float](), list[float]()

    async def start(self, worker: int) -> None:
        pass

    async def encode(self, worker: int, shard: int) -> Any:
        """A shard takes a worker from half to one and a half times the seconds."""
        if worker in self._ended:
            self._waits.append(time.monotonic() - self._ended[worker])
        self._shards[worker] = shard
        await asyncio.sleep(self._seconds * (0.5 + shard * _GOLDEN % 1))
        self._ended[worker] = time.monotonic()
        return SimpleNamespace(shard=shard, counts={"OK": 1})

    async def rows(self, worker: int) -> dict[int, int]:
        return {self._shards[worker]: 0} if worker in self._shards else {}

    async def waits(self) -> list[float]:
        """Seconds from the end of a worker's shard until its next came, of every shard since the last call."""
        found, self._waits = self._waits, []
        self._ended.clear()
        return found


class Worker:
    """One worker of a process, with the methods that an actor has for stage 1 and for the other commands."""

    def __init__(self, host: Any, number: int) -> None:
        def calling(method: Any) -> Any:
            return SimpleNamespace(remote=lambda *words, **_: method.remote(number, *words))

        self.start = SimpleNamespace(remote=lambda *_, **__: host.start.remote(number))
        self.encode, self.rows = calling(host.encode), calling(host.rows)
        self.open, self.do = self.start, self.encode


@click.command()
@click.option("--workers", default="10,30,100,300", show_default=True, help="How many, separated by commas.")
@click.option("--processes", default=2, show_default=True, help="That the workers are coroutines of.")
@click.option("--shards", default=10, show_default=True, help="Per worker.")
@click.option("--seconds", default=4.0, show_default=True, help="That a worker takes for a shard, in the mean.")
def ray_scale(workers: str, processes: int, shards: int, seconds: float) -> None:
    """CPU time and memory of a command that gives shards to many workers on Ray, and how long workers wait for it."""
    import ray

    from pipeline import ray_workers  # noqa: F401  # before the clock runs: it imports torch
    from pipeline.ray_cluster import cluster

    lines = list[tuple[str, ...]]()
    with cluster(None, processes, "cpu"):
        host: Any = ray.remote(Host)
        hosts = [host.options(num_cpus=1, max_concurrency=_CALLS).remote(seconds) for _ in range(processes)]
        ray.get([one.start.remote(0) for one in hosts])
        for count in map(int, workers.split(",")):
            for name, run in (("stage 1", _stage_1), ("others", _others)):
                found = [Worker(hosts[number % processes], number) for number in range(count)]
                cpu, wall = time.process_time(), time.perf_counter()
                run(found.pop, count, count * shards)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                waits = sorted(1e3 * wait for one in hosts for wait in ray.get(one.waits.remote()))
                middle, high = waits[len(waits) // 2], waits[len(waits) * 99 // 100]
                cost = f"{1e3 * cpu / (count * shards):.2f}", f"{100 * cpu / wall:.0f}%"
                lines.append((str(count), name, *cost, f"{middle:.0f}", f"{high:.0f}", f"{_resident() / 1e6:.0f}"))
                click.echo(" ".join(lines[-1]), err=True)
    head = ("workers", "command", "CPU ms per shard", "of a core", "wait ms", "wait ms, 99%", "MB")
    click.echo(table(head, lines))
    click.echo(f"{machine()}; {processes} processes of Ray, {shards} shards per worker of {seconds:g} s")


def _stage_1(new: Callable[[], Worker], workers: int, shards: int) -> None:
    from dimefm.system.progress import Progress
    from pipeline.ray_workers import _Supervisor

    job: Any = SimpleNamespace(device="cpu")
    found = _Supervisor(job, workers, 1, dict.fromkeys(range(shards), 1), check=False)
    found._new_actor = new
    with Progress("encoding", shards, "image", 0) as progress:
        found.run(progress, 0)


def _others(new: Callable[[], Worker], workers: int, shards: int) -> None:
    from pipeline.ray_shards import _Supervisor

    work: Any = SimpleNamespace(name=str)
    for _ in _Supervisor(new, workers, work, range(shards), click.echo).run():
        pass


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
