"""`select-texts` on a real local Ray: the same bytes as in one process, and wherever it is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.retrieve import write_pairs
from dimefm.selection import repetitions
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.system.shard_work import ShardWork, run_here
from pipeline.ray_shards import on_ray
from tests.stores import random_store


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs over sentences of which every tenth repeats another, in five shards."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 16))
    values[::10] = values[1::10] + 0.01 * rng.standard_normal((30, 16))
    images, _ = random_store(folder / "i.zarr", rows=64, shard_rows=32)
    texts, _ = random_store(folder / "t.zarr", rows=300, shard_rows=64, kind="text", values=values, failed=(7,))
    out = str(folder / "p.zarr")
    write_pairs(images, texts, ExactSearch(texts), index="exact", index_digest="e", top_k=4, out=out)
    return out


def selected(pairs: str, out: Path, run: Any) -> dict[str, bytes]:
    """The files of a selection that scores, clusters and compares."""
    words: dict[str, Any] = {"by": "similarity", "dedup": 0.95, "pool": 280, "balance": True, "size": 150}
    select_texts(SelectionConfig(pairs=pairs, out=str(out), device="cpu", **words), run=run)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("[!.]*") if path.is_file()}


@pytest.mark.slow  # the runner has quick tests, and so has the work in one process
def test_on_ray_a_selection_has_the_same_bytes(
    one_ray: None, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = selected(pairs, tmp_path / "here", run_here)
    assert sum(name.startswith("scores/") for name in here) == 5
    assert not any(name.startswith(("clusters", "grounding")) for name in here)
    monkeypatch.setattr(repetitions, "_UNIT", 50)  # several units
    assert selected(pairs, tmp_path / "ray", on_ray(1)) == here


def test_a_run_that_stops_anywhere_goes_on_and_does_nothing_twice(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after each unit of scoring, clustering and comparing."""
    monkeypatch.setattr(repetitions, "_UNIT", 50)
    units, stops = list[str](), 0
    whole = selected(pairs, tmp_path / "whole", run_here)

    def one_unit(work: ShardWork[Any, Any], pending: Any, say: Any) -> Iterator[tuple[Any, Any]]:
        for unit, result in run_here(work, pending[:1], say):
            units.append(f"{type(work).__name__} {unit}")
            yield unit, result
        if pending:
            raise KeyboardInterrupt

    while True:
        try:
            found = selected(pairs, tmp_path / "stopped", one_unit)
            break
        except KeyboardInterrupt:
            stops += 1
    assert found == whole
    assert stops == len(units) == len(set(units)) > 5 + 5 + 3
