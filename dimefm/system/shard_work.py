"""Work on shards, as the code that does it sees it: it gives the work and its units to a `ShardRunner`, and takes the
results as they come. `run_here` runs in this process; `pipeline.ray_shards.on_ray` runs on many, and is given from
outside, since nothing below `pipeline` knows of Ray.

    @dataclass(frozen=True)
    class Doubling:                                  # a ShardWork of int and str: it is pickled and sent
        store: str                                   # paths and settings, nothing that is open

        def open(self, seat: Seat) -> Callable[[int], str]:
            store = Store(self.store)                # once per worker
            return lambda shard: ...                 # once per shard: does it, writes it, commits it

        def name(self, unit: int) -> str:
            return f"shard {unit}"                   # in messages

    for shard, result in run(Doubling("I.zarr"), [0, 1, 2], progress.note):
        progress.at(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dimefm.system.notes import note

_Unit = TypeVar("_Unit")
_Result = TypeVar("_Result")
_Unit_contra = TypeVar("_Unit_contra", contravariant=True)
_Result_co = TypeVar("_Result_co", covariant=True)


@dataclass(frozen=True)
class Seat:
    """What a worker may use of its machine: so many threads, and cuda or the cpu alone. None: all that this process
    would use of itself, as where there is one worker."""

    threads: int | None = None
    device: str | None = None


class ShardWork(Protocol[_Unit_contra, _Result_co]):
    """What is done to each unit: a shard, several, or a part. It is pickled, and so are units and results.

    A unit whose worker is lost is done again by another worker, and may have been done in part or whole: what is
    written must be the same each time, and its commit last.
    """

    def open(self, seat: Seat) -> Callable[[_Unit_contra], _Result_co]:
        """Open what all units need, such as an index, once per worker. What it returns is called with each unit, in one
        thread."""

    def name(self, unit: _Unit_contra) -> str:
        """The unit in messages, such as "shard 3"."""


class ShardRunner(Protocol):
    """Has work done, here or elsewhere."""

    def __call__(
        self,
        work: ShardWork[_Unit, _Result],
        units: Sequence[_Unit],
        say: Callable[[str], None] = ...,
        *,
        memory: int = ...,
    ) -> Iterator[tuple[_Unit, _Result]]:
        """Do every unit, and yield each with its result as it is finished, in any order. Nothing is opened where there
        are no units. `say` gets a line where a worker is lost; `memory` is what the work keeps open in each worker, in
        bytes, where that is much. Raises what the work raises; what it has written stays."""


def run_here(
    work: ShardWork[_Unit, _Result],
    units: Sequence[_Unit],
    say: Callable[[str], None] = note,
    *,
    memory: int = 0,
) -> Iterator[tuple[_Unit, _Result]]:
    """Do the units one after another in this process: a `ShardRunner`."""
    if units:
        do = work.open(Seat())
        for unit in units:
            yield unit, do(unit)
