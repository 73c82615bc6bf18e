"""Plans and other small tables on disk, as Parquet with a digest."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.embedding_store import rows_path
from dimefm.errors import StoreError
from dimefm.system import storage

PLAN_DAMAGED = "put the file back from a copy, or cache again into another --out"


def write_plan(path: str, shard: int, table: pa.Table) -> str:
    """Write the plan of one shard; returns its sha256."""
    return write_table(storage.join(path, rows_path(shard)), table)


def write_table(path: str, table: pa.Table) -> str:
    """Write a table as a Parquet file; returns its sha256. Raises StoreError where it cannot be written."""
    data = parquet_bytes(table)
    with storage.writing_to(path):
        storage.write_atomic(path, data)
    return sha256(data)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the content of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(
    path: str, digest: str | None, columns: tuple[str, ...] = (), repeated: tuple[str, ...] = ()
) -> pa.Table:
    """Read a Parquet file that must have this sha256; if `columns` are given, only those. Columns in `repeated`, which
    have few values many times, come as Arrow dictionaries, which is several times as fast.

    Raises StoreError where the file is missing or damaged.
    """
    data = require_digest(path, digest, PLAN_DAMAGED)
    try:
        # One thread, no dataset scanner: a table is small, and Arrow's threads can outlive the interpreter.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(repeated))
        return file.read(list(columns) or None, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read: {error}", remedy=PLAN_DAMAGED) from None


def require_digest(path: str, digest: str | None, remedy: str) -> bytes:
    """The content of a file. Raises StoreError unless it has this sha256, as when the store was planned."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing", remedy=remedy) from None
    if sha256(data) != digest:
        raise StoreError(f"{path} is damaged: its checksum does not fit", remedy=remedy)
    return data


def sha256(data: bytes) -> str:
    """The sha256 of some bytes, as hex."""
    return hashlib.sha256(data).hexdigest()
