"""A runner of work on shards as workers on Ray are one, without any: for tests that need no Ray for what they prove."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dimefm.system.notes import note
from dimefm.system.shard_work import Seat


def run_elsewhere(
    work: Any, units: Sequence[Any], say: Callable[[str], None] = note, *, memory: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Every unit twice, as after a worker was lost, last first, by work that was pickled and is opened anew."""
    for unit in reversed(units):
        for _ in range(2):
            result = pickle.loads(pickle.dumps(work)).open(Seat(threads=1, device="cpu"))(unit)
        yield unit, pickle.loads(pickle.dumps(result))
