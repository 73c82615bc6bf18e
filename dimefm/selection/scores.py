"""Scores of the rows of a store, a shard at a time, kept on disk so that a stopped run goes on.

A scorer says what a score is: it is read once by each worker, and then given the embeddings of a shard. The file of a
shard is float32 (rows of the shard,), NaN without an embedding, then the crc32c of those bytes; little-endian.

Shapes: T rows of the store, N rows of a shard, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.checked_file import read_checked, write_checked
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here

_Array = np.ndarray[Any, Any]


class Scorer(Protocol):
    """What a score is. It can be pickled."""

    def load(self, width: int, device: str) -> Callable[[_Array], _Array]:
        """Gives the scores float32 (N,) of embeddings (N, D) of this width."""


def score_rows(
    store: Store,
    folder: str,
    scorer: Scorer,
    *,
    device: str,
    prepare: Callable[[], None],
    earlier: str | None = None,
    run: ShardRunner = run_here,
) -> _Array:
    """The score of every row, float32 (T,), NaN without an embedding; the scores of each shard are kept in `folder`.

    A shard whose scores are already in `folder`, or in `earlier`, is not scored again, unless they are damaged.
    `prepare` is called before the first that is. Raises StoreError where `folder` cannot be written.
    """
    schema = store.schema
    score_T = np.full(schema.rows, np.nan, np.float32)
    pending = list[int]()
    for shard in range(schema.shards):
        start, stop = schema.shard_range(shard)
        found = _read_scores(folder, shard, stop - start)
        if found is None and earlier is not None:
            found = _read_scores(earlier, shard, stop - start)
        if found is None:
            pending.append(shard)
        else:
            score_T[start:stop] = found
    done = schema.rows - sum(stop - start for start, stop in map(schema.shard_range, pending))
    with Progress("scoring", schema.rows, schema.kind, done) as progress:
        if pending:
            prepare()
        for shard, found in run(Scoring(store.path, folder, scorer, device), pending, progress.note):
            start, stop = schema.shard_range(shard)
            score_T[start:stop] = found
            done += stop - start
            progress.at(done)
    return score_T


@dataclass(frozen=True)
class Scoring:
    """Work of `score_rows` on a shard of `store`: writes its scores to `folder`, and returns them, float32 (N,)."""

    store: str
    folder: str
    scorer: Scorer
    device: str

    def open(self, seat: Seat) -> Callable[[int], _Array]:
        if seat.threads is not None:
            torch.set_num_threads(seat.threads)
        store = Store(self.store)
        scores = self.scorer.load(store.schema.dim, seat.device or self.device)

        def do(shard: int) -> _Array:
            start, stop = store.schema.shard_range(shard)
            score_N = np.full(stop - start, np.nan, np.float32)
            rows_N, embedding_ND = store.valid_rows(start, stop)
            score_N[rows_N - start] = scores(embedding_ND)
            write_checked(_path(self.folder, shard), score_N.astype("<f4").tobytes())
            return score_N

        return do

    def name(self, unit: int) -> str:
        return f"shard {unit}"


def _path(folder: str, shard: int) -> str:
    return storage.join(folder, f"{shard:06d}")


def _read_scores(folder: str, shard: int, count: int) -> _Array | None:
    """The scores of a shard that has `count` rows; None where they are missing or damaged."""
    data = read_checked(_path(folder, shard))
    if data is None or len(data) != count * 4:
        return None
    return np.frombuffer(data, "<f4").astype(np.float32)
