"""Plans and other small tables on disk, as Parquet with a digest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.embedding_store import rows_path
from dimefm import storage
from dimefm.errors import StoreError

PLAN_DAMAGED = "put the file back from a copy, or cache again into another --out"


def write_plan(path: str, shard: int, table: pa.Table) -> str:
    """Write the plan of one shard; its sha256."""
    return write_table(storage.join(path, rows_path(shard)), table)


def plan_digest(digests: Iterable[str]) -> str:
    """One sha256 for the whole plan, from those of its shards in order."""
    return sha256(b"".join(map(bytes.fromhex, digests)))


def write_table(path: str, table: pa.Table) -> str:
    """A table as a Parquet file; its sha256. Raises StoreError where it cannot be written."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    with storage.writing_to(path):
        storage.write_atomic(path, data)
    return sha256(data)


def read_table(path: str, schema: pa.Schema) -> pa.Table:
    """A small Parquet file. Raises StoreError where it is missing, damaged or has other columns."""
    try:
        # One thread, no dataset scanner: a table is small, and Arrow's threads can outlive the interpreter.
        table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path))).read(use_threads=False)
        return table.select(schema.names).cast(schema)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read: {error}", remedy=PLAN_DAMAGED) from None


def sha256(data: bytes) -> str:
    """As hex."""
    return hashlib.sha256(data).hexdigest()
