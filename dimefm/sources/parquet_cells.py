"""Read single images from columns of Parquet files, by row: a process keeps the files and blocks that it read last."""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dimefm.sources.parquet import (
    BLOCK_BYTES,
    Column,
    columns_of,
    flat_values,
    open_parquet,
    read_blocks,
    rows_per_block,
)
from dimefm.system import storage

_FILES, _BLOCKS = 8, 4  # files kept open, and blocks kept decoded, in a process
KEPT_BYTES = _BLOCKS * BLOCK_BYTES
"""Files that together are no larger than this are read by row equally fast in any order."""
_COLUMN_AND_PLACE = re.compile(r"(.*)\[(\d+)\]", re.DOTALL)


def read_cell(path: str, column: str, row: int) -> bytes | None:
    """The bytes in a row of a binary column, or of the field `bytes` of a struct column; None for null. COLUMN[N] is
    element N in a column of lists of either. Safe in threads and in forked processes.

    Raises IndexError where the file has no such row or the list no such element, KeyError where the file has no such
    column, OSError, MemoryError, and DamagedParquetError.
    """
    return _cells.read(path, column, row)


def forget_cells() -> None:
    """Make the next `read_cell` ask the storage: the blocks that this process kept would hide that a file is gone."""
    global _cells
    _cells = _Cells()


class _Cells:
    """The files and blocks that this process read last: rows mostly come in order, so the next is likely in one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, int, int], tuple[pq.ParquetFile, list[int], dict[str, Column]]]
        self._files = OrderedDict()
        self._blocks: OrderedDict[tuple[Any, ...], pa.RecordBatch] = OrderedDict()
        # The row group that is being read, and the number of its next block.
        self._reading: tuple[tuple[Any, ...], Iterator[pa.RecordBatch]] | None = None
        self._next = 0

    def read(self, path: str, column: str, row: int) -> bytes | None:
        with self._lock:
            key, file, stops, columns = self._open(path)
            group = bisect_right(stops, row)
            if group == len(stops):
                raise IndexError(row)
            row_in_group = row - (stops[group - 1] if group else 0)
            found, place_in_list = _find_column(columns, column)
            is_struct = place_in_list is None and pa.types.is_struct(found.type)
            leaf = f"{found.leaf}.bytes" if is_struct else found.leaf
            number, row_in_block = divmod(row_in_group, rows_per_block(file, [leaf], group))
            block = self._block(file, leaf, (*key, leaf, group), number)
            values, _ = flat_values(block.slice(row_in_block, 1), found)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        value: bytes | None = values[place_in_list or 0].as_py()
        return value

    def _open(self, path: str) -> tuple[tuple[str, int, int], pq.ParquetFile, list[int], dict[str, Column]]:
        """A key that a later file of the same name does not have, the file, the row at which each of its row groups
        stops, and its columns."""
        status = None if storage.is_url(path) else os.stat(path)  # noqa: PTH116
        key = (path, status.st_mtime_ns, status.st_size) if status else (path, 0, 0)
        if key not in self._files:
            file = open_parquet(path)
            groups = range(file.metadata.num_row_groups)
            stops = list(accumulate(file.metadata.row_group(group).num_rows for group in groups))
            self._files[key] = file, stops, columns_of(file.schema_arrow)
        self._files.move_to_end(key)
        if len(self._files) > _FILES:
            self._files.popitem(last=False)[1][0].close()
            self._reading = None  # it may be of that file
        return key, *self._files[key]

    def _block(self, file: pq.ParquetFile, leaf: str, key: tuple[Any, ...], number: int) -> pa.RecordBatch:
        """Block `number` of the row group that ends `key`: one that is kept, or the one that the reading comes to next,
        or else by reading the group again from its beginning."""
        block = self._blocks.pop((key, number), None)
        if block is None:
            if self._reading is None or self._reading[0] != key or self._next > number:
                self._reading, self._next = (key, read_blocks(file, [leaf], key[-1])), 0
            batches = self._reading[1]
            try:
                while self._next <= number:
                    block = next(batches)
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
    # A child shares the position in open files with its parent, and a lock that was held at the fork is never released.
    os.register_at_fork(after_in_child=forget_cells)


def _find_column(columns: dict[str, Column], name: str) -> tuple[Column, int | None]:
    """The column NAME and None, or for NAME[N] that column and N. Raises KeyError."""
    match = None if name in columns else _COLUMN_AND_PLACE.fullmatch(name)
    return (columns[match[1]], int(match[2])) if match else (columns[name], None)
