"""IMAGES.zarr and TEXTS.zarr: group attributes, arrays, status codes and the layout of files.

STORE.zarr/
  zarr.json              attributes: an EmbeddingStore document under the key "dimefm"
  embedding/             float16 (rows, dim), unit norm, sharded, crc32c on every chunk, uncompressed
  status/                uint8 (rows,), a Status code each
  rows/<shard>.parquet   the plan, written before any work (plan.py)
  commits/<shard>.json   written last, one per finished shard (commit.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal

from cache_schemas.document import Document, digest_of
from cache_schemas.identity import TeacherIdentity
from cache_schemas.problems import Problem

ATTRIBUTES_KEY = "dimefm"
EMBEDDING, STATUS, ROWS, COMMITS = "embedding", "status", "rows", "commits"
EMBEDDING_DTYPE, STATUS_DTYPE = "float16", "uint8"


class Status(IntEnum):
    """What became of a row. Everything but PENDING and OK is a failure that keeps its place."""

    PENDING = 0
    OK = 1
    MISSING = 2  # the file is gone or cannot be opened
    EMPTY = 3  # zero bytes
    TRUNCATED = 4  # the file or archive ends before the sample does
    UNDECODABLE = 5  # not an image, or a broken one
    TOO_LARGE = 6  # more pixels than the limit: a decompression bomb, or a scan
    NOT_FINITE = 7  # the teacher gave NaN, infinity or a zero vector


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What was planned: `digest` covers every file's path and size; `problems` are files that could not be read
    through; `dropped` counts sentences left out at plan time, by reason."""

    arguments: tuple[str, ...]
    files: int
    bytes: int
    digest: str
    repeated_keys: int
    dropped: dict[str, int]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmbeddingStore(Document):
    """The attributes of an embedding store."""

    SCHEMA: ClassVar[str] = "dimefm.embedding-store"

    kind: Literal["image", "text"]
    rows: int
    dim: int
    chunk_rows: int
    shard_rows: int
    batch_size: int
    teacher: TeacherIdentity
    source: SourceSummary

    def problems(self) -> list[Problem]:
        fields = ("rows", "dim", "chunk_rows", "batch_size")
        found = [Problem(f, f"must be at least 1, found {getattr(self, f)}") for f in fields if getattr(self, f) < 1]
        if self.chunk_rows > 0 and (self.shard_rows < 1 or self.shard_rows % self.chunk_rows):
            found.append(Problem("shard_rows", f"must be a multiple of chunk_rows, found {self.shard_rows}"))
        if self.dim != self.teacher.embed_dim:
            found.append(Problem("dim", f"is {self.dim}, but teacher.embed_dim is {self.teacher.embed_dim}"))
        return found

    @property
    def shards(self) -> int:
        """Number of shards: the units of work, ceil(rows / shard_rows)."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row and one past the last row of `shard`."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    @property
    def identity(self) -> str:
        """Digest of teacher, source and kind: what an index or a run refers to."""
        return digest_of({"kind": self.kind, "teacher": self.teacher.compared(), "source": self.source.digest})


def rows_path(shard: int) -> str:
    """Where, within a store, the plan of `shard` is."""
    return f"{ROWS}/{shard:06d}.parquet"


def commit_path(shard: int) -> str:
    """Where, within a store, the commit of `shard` is."""
    return f"{COMMITS}/{shard:06d}.json"
