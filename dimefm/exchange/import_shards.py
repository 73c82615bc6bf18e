"""The shards of an imported store: read from the folder, normalised, written and committed one by one.

Shapes: N rows, F of them failed, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cache_schemas import Failure, Status
from cache_schemas.embedding_store import EMBEDDING, STATUS
from dimefm.exchange.clip_retrieval_folder import Folder
from dimefm.store.embedding_store import Store
from dimefm.store.reopen import reopen
from dimefm.system import storage
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner

_COPIES = 4  # of a shard in the memory of a worker: as read, and as zarr writes it
_BAD_VECTOR = "the imported embedding is NaN, infinite or zero"
_NO_IMAGE = "no image of the sources has this key, or it is not known which of several"


def write_shards(store: Store, folder: Folder, run: ShardRunner, *, unmatched_fail: bool) -> None:
    """Have every shard without a commit written. With `unmatched_fail`, a row whose plan names no file gets no
    embedding."""
    schema, committed = store.schema, store.committed()
    pending = sorted(set(range(schema.shards)) - committed)
    if not pending:
        return
    storage.remove_leftovers(store.path)
    done = sum(stop - start for start, stop in map(schema.shard_range, committed))
    with Progress("importing", schema.rows, "row", done) as progress:
        work, memory = ImportShards(store.path, folder, unmatched_fail), _COPIES * schema.shard_bytes
        for shard, _ in run(work, pending, progress.note, memory=memory):
            start, stop = schema.shard_range(shard)
            done += stop - start
            progress.at(done)


@dataclass(frozen=True)
class ImportShards:
    """The writing of shards, as a `system.shard_work.ShardWork`."""

    store: str
    folder: Folder
    unmatched_fail: bool

    def open(self, seat: Seat) -> Callable[[int], None]:
        """Raises UnreadableError where the store or the folder is not there."""
        return partial(self._write_shard, reopen(self.store, self.folder.root))

    def name(self, unit: int) -> str:
        """The shard in messages."""
        return f"shard {unit}"

    def _write_shard(self, store: Store, shard: int) -> None:
        began = time.monotonic()
        embedding_ND, good_N = self.folder.read(*store.schema.shard_range(shard))
        status_N = np.where(good_N, Status.OK, Status.NOT_FINITE).astype(np.uint8)
        plan = store.plan(shard)
        if self.unmatched_fail:
            status_N[np.array(plan["file"].to_pylist()) == ""] = Status.MISSING
        failed_F = np.flatnonzero(status_N != Status.OK)
        embedding_ND[failed_F] = 0
        failures = [
            _failure(row, status_N[i]) for i, row in zip(failed_F, plan.take(failed_F).to_pylist(), strict=True)
        ]
        arrays, seconds = {EMBEDDING: embedding_ND, STATUS: status_N}, time.monotonic() - began
        store.write_shard(shard, arrays, failures, device="import", seconds=seconds)


def _failure(row: dict[str, Any], code: int) -> Failure:
    reason = _NO_IMAGE if code == Status.MISSING else _BAD_VECTOR
    return Failure(row=row["row"], key=row["key"], file=row.get("file", ""), status=Status(code).name, reason=reason)
