"""The commit of a shard: a small document, written after its arrays, that makes the shard count as done.

Shapes: N rows of the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Commit, Failure, Status
from cache_schemas.commit import FAILURES, MOST_FAILURES
from cache_schemas.embedding_store import commit_path, failures_path
from dimefm.errors import StoreError
from dimefm.store.parquet_tables import require_digest, write_table
from dimefm.store.zarr_arrays import DAMAGED
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.versions import versions


def make_commit(
    shard: int,
    start: int,
    status_N: np.ndarray[Any, Any],
    failures: Sequence[Failure],
    *,
    digest: str,
    device: str,
    seconds: float,
    plan: str | None = None,
    pixels: str | None = None,
    images: str | None = None,
) -> Commit:
    """The commit of a shard whose rows, from `start` on, have these status codes."""
    codes, counts = np.unique(status_N, return_counts=True)
    return Commit(
        shard=shard,
        start=start,
        stop=start + len(status_N),
        counts={Status(code).name: int(n) for code, n in zip(codes, counts, strict=True)},
        failures=tuple(failures),
        digest=digest,
        device=device,
        seconds=round(seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        plan=plan,
        pixels=pixels,
        images=images,
    )


def write_commit(store: str, commit: Commit) -> Commit:
    """Write a commit; where there are many failures, first the table of them. Returns the commit as written. Raises
    OSError, and StoreError where another command has taken the lease of the store. The earlier commit of the shard was
    removed before its arrays were written."""
    if len(commit.failures) > MOST_FAILURES:
        columns = {name: [getattr(failure, name) for failure in commit.failures] for name in FAILURES.names}
        table = pa.table(columns, schema=FAILURES)
        digest = write_table(storage.join(store, failures_path(commit.shard)), table)
        commit = replace(commit, failures=(), table=digest)
    require_held(store)
    path = storage.join(store, commit_path(commit.shard))
    if not storage.is_url(path):
        storage.write_json(path, commit.to_json())
    elif not storage.create(path, storage.json_bytes(commit.to_json())):
        what = f"{path} has just been written by another command"
        raise StoreError(what, remedy="let one command alone write there, and run it again; what was finished is kept")
    return commit


def remove_commit(store: str, shard: int) -> None:
    """Remove the commit of a shard that is to be written again. Raises OSError; and StoreError as `write_commit` does,
    since the commit is then the other command's."""
    require_held(store)
    for path in (commit_path(shard), failures_path(shard)):
        storage.remove_file(storage.join(store, path))


def read_failures(store: str, commit: Commit) -> Iterator[Failure]:
    """The rows of a shard that have no embedding, each with the reason. Raises StoreError where their table is missing
    or damaged."""
    if commit.table is None:
        yield from commit.failures
        return
    data = require_digest(storage.join(store, failures_path(commit.shard)), commit.table, DAMAGED)
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(use_threads=False):
        yield from (Failure(**row) for row in batch.to_pylist())
