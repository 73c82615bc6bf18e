"""A whole store read and written on a real local Ray: the bytes and the report of one process, though a worker is
killed over its work. What the rooms promise of their work on shards is tested there, without Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.system.shard_work import Seat
from pipeline.ray_shards import on_ray
from tests.making import tree
from tests.stores import random_store


@dataclass(frozen=True)
class Deadly:
    """Other work, whose process is killed once: after it has done a unit, and before anyone hears of it."""

    work: Any
    unit: int
    died: Path

    def open(self, seat: Seat) -> Callable[[int], Any]:
        do = self.work.open(seat)

        def done(unit: int) -> Any:
            result = do(unit)
            if unit == self.unit and not self.died.exists():
                self.died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return done

    def name(self, unit: int) -> str:
        found: str = self.work.name(unit)
        return found


@pytest.mark.slow  # the runner has quick tests on Ray, and the work has some in other processes
def test_an_export_and_a_verification_are_those_of_one_process(one_ray: None, tmp_path: Path) -> None:
    keys = [f"k{row % 40}" for row in range(60)]
    store, _ = random_store(tmp_path / "s.zarr", rows=60, shard_rows=16, keys=keys, failed=(3, 20))
    notes = list[str]()

    memory_of = dict[str, int]()

    def deadly(work: Any, units: Sequence[Any], say: Any = None, *, memory: int = 0) -> Any:
        memory_of[type(work).__name__] = memory
        return on_ray(1)(Deadly(work, units[1], tmp_path / "died"), units, notes.append)

    alone = export_embeddings(store.path, str(tmp_path / "alone"))
    found = export_embeddings(store.path, str(tmp_path / "ray"), run=deadly)
    assert notes == ["file 1 of the export lost its worker: it is done again"]
    assert tree(Path(found)) == tree(Path(alone))
    assert memory_of == {"ExportFiles": 4 * store.schema.shard_bytes}
    assert store.schema.shard_bytes == 16 * (2 * store.schema.dim + 1)
    config = VerifyConfig(store=store.path)
    assert verify(config, on_ray(2)).facts() == verify(config).facts()
    assert verify(config).faults[-1] == "repeated keys: 20, where the source had 0"
