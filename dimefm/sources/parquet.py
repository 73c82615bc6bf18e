"""Parquet files, a column at a time and in bounded memory: forward for listing, by row for reading."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dimefm import storage
from dimefm.sources.files import open_seekable

SUFFIX = ".parquet"
BLOCK_BYTES, _BLOCK_ROWS = 32 << 20, 8192
"""What is read of a row group at a time, at most; whole groups where they are smaller."""

_BUFFER = 1 << 20  # bytes of a column chunk that are read ahead; without it the chunk is read whole
_FILES, _BLOCKS = 8, 4  # kept open, and kept decoded, in a process
KEPT_BYTES = _BLOCKS * BLOCK_BYTES
"""Files that are no larger than this together are read by row as fast in any order."""


class DamagedParquetError(Exception):
    """What is there of a Parquet file cannot be understood: it was cut short, or is something else."""


def open_parquet(path: str) -> pq.ParquetFile:
    """The file, its footer read. Raises OSError, MemoryError, or DamagedParquetError."""
    source = open_seekable(path) if storage.is_url(path) else path
    try:
        return pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _translated(error) from error


def blocks(file: pq.ParquetFile, columns: list[str], group: int) -> Iterator[pa.RecordBatch]:
    """These columns (or fields of struct columns, COLUMN.FIELD) of a row group, in blocks of `block_rows` rows.

    Raises OSError, MemoryError and DamagedParquetError.
    """
    try:
        # One thread: workers of a DataLoader are forked, and Arrow's pool of threads does not come along.
        yield from file.iter_batches(block_rows(file, columns, group), [group], columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _translated(error) from error


def block_rows(file: pq.ParquetFile, columns: list[str], group: int) -> int:
    """Rows of a block: BLOCK_BYTES of these columns by the mean of the row group, and at least one."""
    facts = file.metadata.row_group(group)
    chunks = (facts.column(i) for i in range(facts.num_columns))
    size: int = sum(c.total_uncompressed_size for c in chunks if _is_within(c.path_in_schema, columns))
    rows = int(facts.num_rows)
    return max(1, min(_BLOCK_ROWS, rows, BLOCK_BYTES * rows // max(1, size)))


def read_cell(path: str, column: str, row: int) -> bytes | None:
    """The bytes in a binary column, or in the `bytes` of a struct column; None for null. Safe in threads and forks.

    Raises IndexError where the file has no such row, KeyError where it has no such column, OSError,
    MemoryError, and DamagedParquetError.
    """
    return _cells.read(path, column, row)


def forget_cells() -> None:
    """Let the next `read_cell` ask the storage: what this process kept would answer for files that are gone."""
    global _cells
    _cells = _Cells()


def is_string(type_: pa.DataType) -> bool:
    """Whether values of this type are read as str."""
    if pa.types.is_dictionary(type_):
        return is_string(type_.value_type)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


class _Cells:
    """The files and blocks that were read last, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, int, int], tuple[pq.ParquetFile, list[int]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[Any, ...], pa.Array] = OrderedDict()
        # The row group that is being read, and the number of its next block: rows mostly come in order.
        self._reading: tuple[tuple[Any, ...], Iterator[pa.RecordBatch]] | None = None
        self._next = 0

    def read(self, path: str, column: str, row: int) -> bytes | None:
        with self._lock:
            key, file, stops = self._open(path)
            group = bisect_right(stops, row)
            if group == len(stops):
                raise IndexError(row)
            place = row - (stops[group - 1] if group else 0)
            columns = [_leaf(file.schema_arrow, column)]
            number, place = divmod(place, block_rows(file, columns, group))
            value = self._block(file, columns, (*key, column, group), number)[place].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _open(self, path: str) -> tuple[tuple[str, int, int], pq.ParquetFile, list[int]]:
        """What tells this file from a later one of the same name, the file, and where each of its row groups stops."""
        status = None if storage.is_url(path) else os.stat(path)  # noqa: PTH116
        key = (path, status.st_mtime_ns, status.st_size) if status else (path, 0, 0)
        if key not in self._files:
            file = open_parquet(path)
            groups = range(file.metadata.num_row_groups)
            self._files[key] = file, list(accumulate(file.metadata.row_group(group).num_rows for group in groups))
        self._files.move_to_end(key)
        if len(self._files) > _FILES:
            self._files.popitem(last=False)[1][0].close()
            self._reading = None  # it may be of that file
        return key, *self._files[key]

    def _block(self, file: pq.ParquetFile, columns: list[str], key: tuple[Any, ...], number: int) -> pa.Array:
        block = self._blocks.pop((key, number), None)
        if block is None:
            if self._reading is None or self._reading[0] != key or self._next > number:
                self._reading, self._next = (key, blocks(file, columns, key[-1])), 0
            batches = self._reading[1]
            try:
                while self._next <= number:
                    block = next(batches).column(0)
                    self._next += 1
            except BaseException:
                self._reading = None
                raise
        self._blocks[key, number] = block
        if len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        return block


_cells = _Cells()


if hasattr(os, "register_at_fork"):
    # Files of the parent share their position with it, and its lock may be held for ever.
    os.register_at_fork(after_in_child=forget_cells)


def _leaf(schema: pa.Schema, column: str) -> str:
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def _is_within(path: str, columns: list[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _translated(error: Exception) -> Exception:
    """Arrow's own errors, and the OSErrors without a number that it raises for pages it cannot read, apart from those
    of the storage and of the machine."""
    if isinstance(error, MemoryError):  # ArrowMemoryError is one, and an ArrowException too
        return MemoryError(str(error))
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        return error
    return DamagedParquetError(str(error).strip().split("\n")[0])
