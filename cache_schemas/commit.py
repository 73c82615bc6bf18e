"""commits/<shard>.json: written last, so that a shard without a commit is not done.

If more than MOST_FAILURES of its rows failed, these are in a table beside it, commits/<shard>.failures.parquet, with
the columns FAILURES: so a commit stays quick to read, whatever has failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from cache_schemas.document import Document
from cache_schemas.problems import Problem

MOST_FAILURES = 16
FAILURES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("key", "file", "status", "reason")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A row that has no embedding, and why. `status` is the name of a Status."""

    row: int
    key: str
    file: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Commit(Document):
    """One finished shard: rows `start` to `stop`, without the last.

    `counts` are rows by status. `digest` is the sha256 of the shard's arrays, `plan` that of the plan that they were
    made from, `pixels` that of its tar, if it has one. `table` is the sha256 of the table that holds the failures where
    `failures` does not. `seconds` is the wall time that the shard took. For a shard of pseudo texts, `images` is the
    digest of the shard of images that they were retrieved for; None in older commits.
    """

    SCHEMA: ClassVar[str] = "dimefm.commit"

    shard: int
    start: int
    stop: int
    counts: dict[str, int]
    failures: tuple[Failure, ...]
    digest: str
    device: str
    seconds: float
    finished: str
    versions: dict[str, str]
    plan: str | None = None
    pixels: str | None = None
    table: str | None = None
    images: str | None = None

    def problems(self) -> list[Problem]:
        counted, rows = sum(self.counts.values()), self.stop - self.start
        found = []
        if counted != rows:
            found.append(Problem("counts", f"add up to {counted}, but the shard has {rows} rows"))
        failed = counted - self.counts.get("OK", 0)
        listed = 0 if self.table else failed
        if len(self.failures) != listed:
            where = ", all of them in a table" if self.table else ""
            found.append(Problem("failures", f"lists {len(self.failures)} rows, but counts say {failed} failed{where}"))
        return found
