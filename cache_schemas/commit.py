"""commits/<shard>.json: written last, so a shard without one has not been done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_schemas.document import Document
from cache_schemas.problems import Problem


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
    """One finished shard. `digest` is sha256 over its arrays, `plan` that of the plan that they were made from,
    `pixels` that of its tar, if it has one; `seconds` is the wall time it took."""

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

    def problems(self) -> list[Problem]:
        counted, rows = sum(self.counts.values()), self.stop - self.start
        found = []
        if counted != rows:
            found.append(Problem("counts", f"add up to {counted}, but the shard has {rows} rows"))
        failed = counted - self.counts.get("OK", 0)
        if len(self.failures) != failed:
            found.append(Problem("failures", f"lists {len(self.failures)} rows, but counts say {failed} failed"))
        return found
