"""Parquet files, a column at a time and in bounded memory: forward for listing, by row for reading."""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dimefm.sources.files import open_seekable
from dimefm.system import storage
from dimefm.system.first_bytes import HEAD_BYTES, describe

SUFFIX = ".parquet"
BLOCK_BYTES, _BLOCK_ROWS = 32 << 20, 8192
"""What is read of a row group at a time, at most; whole groups where they are smaller."""

_BUFFER = 1 << 20  # bytes of a column chunk that are read ahead; without it the chunk is read whole
_FILES, _BLOCKS = 8, 4  # kept open, and kept decoded, in a process
KEPT_BYTES = _BLOCKS * BLOCK_BYTES
"""Files that are no larger than this together are read by row as fast in any order."""

_STRINGS = {kind().id for kind in (pa.string, pa.large_string, pa.string_view)}
_BYTES = {pa.binary(1).id, *(kind().id for kind in (pa.binary, pa.large_binary, pa.binary_view))}
_LISTS = {pa.list_(pa.null(), 1).id} | {
    kind(pa.null()).id for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
}
_MAGIC = b"PAR1"
_TAIL_BYTES = 1 << 16  # that Arrow reads first; they end with the length of the footer and _MAGIC
_SIGNATURE_BYTES = 28  # of a footer that can be read though columns are encrypted
_PLACE = re.compile(r"(.*)\[(\d+)\]", re.DOTALL)


class DamagedParquetError(Exception):
    """What is there of a Parquet file cannot be understood: it was cut short, or is something else."""


class Column(NamedTuple):
    """A column, or a field of structs in a column: the names that lead to it from the top, its type, what of the file
    is read for it, and whether the structs are in a list, so that a row may have several or none."""

    fields: tuple[str, ...]
    type: pa.DataType
    leaf: str
    in_list: bool = False


def open_parquet(path: str) -> pq.ParquetFile:
    """The file, its footer read. Raises OSError, MemoryError, or DamagedParquetError."""
    source, is_url = open_seekable(path), storage.is_url(path)
    footer_bytes = _footer_bytes(source)
    if not is_url:
        source.close()
    try:
        file = pq.ParquetFile(source if is_url else path, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        found = _translated(error)
        if isinstance(found, DamagedParquetError) and (what := _other_kind(path)):
            found = DamagedParquetError(f"it is {what}")
        raise found from error
    if footer_bytes - file.metadata.serialized_size == _SIGNATURE_BYTES:  # Arrow aborts at an encrypted column
        raise DamagedParquetError("it is encrypted")
    return file


def columns_of(schema: pa.Schema) -> dict[str, Column]:
    """Every column by its name, and every field of structs as COLUMN.FIELD; columns come before fields. Where a file
    has several columns of the same name, none of them."""
    found: dict[str, Column] = {}
    times = Counter(schema.names)
    level = [Column((field.name,), field.type, field.name) for field in schema if times[field.name] == 1]
    while level:
        below = list[Column]()
        for column in level:
            found.setdefault(".".join(column.fields), column)
            in_list, inner = column.in_list or is_list(column.type), element_type(column.type)
            for field in inner if pa.types.is_struct(inner) else ():
                leaf = column.leaf if in_list else f"{column.leaf}.{field.name}"
                below.append(Column((*column.fields, field.name), field.type, leaf, in_list))
        level = below
    return found


def hugging_face_features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of columns, as far as there is some that can be understood."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def describe_damage(path: str, rows: int, error: Exception) -> str:
    """A line about a file that can be read only as far as this."""
    return f"{path}: broken after {rows} rows ({error}); what follows is lost" if rows else f"{path}: broken: {error}"


def read_blocks(file: pq.ParquetFile, columns: list[str], group: int) -> Iterator[pa.RecordBatch]:
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


def flat_values(batch: pa.RecordBatch, column: Column) -> tuple[pa.Array, np.ndarray[Any, Any] | None]:
    """The values of a column in a block; where it holds lists, what is in them, and for each value its row in the
    block."""
    values, rows_N = batch.column(column.fields[0]), None
    for name in (*column.fields[1:], None):
        while is_list(values.type):
            lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
            rows_N = np.repeat(np.arange(len(values)) if rows_N is None else rows_N, lengths)
            values = values.flatten()
        values = values if name is None else pc.struct_field(values, name)
    return values, rows_N


def as_strings(values: pa.Array) -> list[str | None]:
    """Strings, or bytes that are text. Nothing checks that they are UTF-8 when they are written: other bytes become
    U+FFFD."""
    if is_string(values.type):
        try:
            found: list[str | None] = values.to_pylist()
            return found
        except UnicodeDecodeError:
            pass
    plain = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    given: list[bytes | None] = plain.cast(pa.large_binary()).to_pylist()
    return [None if one is None else one.decode("utf-8", errors="replace") for one in given]


def byte_lengths(values: pa.Array) -> list[int | None]:
    """The length of each value of bytes; None for null."""
    if pa.types.is_dictionary(values.type):
        known = pc.binary_length(values.dictionary.cast(pa.large_binary())).take(values.indices)
    else:
        known = pc.binary_length(values.cast(pa.large_binary()))
    found: list[int | None] = known.to_pylist()
    return found


def read_cell(path: str, column: str, row: int) -> bytes | None:
    """The bytes in a binary column, or in the `bytes` of a struct column; None for null. COLUMN[N] is what is at N in a
    column of lists of either. Safe in threads and forks.

    Raises IndexError where the file has no such row or the list no such place, KeyError where the file has no such
    column, OSError, MemoryError, and DamagedParquetError.
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
    return type_.id in _STRINGS


def is_bytes(type_: pa.DataType) -> bool:
    """Whether values of this type are read as bytes."""
    if pa.types.is_dictionary(type_):
        return is_bytes(type_.value_type)
    return type_.id in _BYTES


def is_list(type_: pa.DataType) -> bool:
    """Whether values of this type are read as lists; a map is none."""
    return type_.id in _LISTS


def element_type(type_: pa.DataType) -> pa.DataType:
    """The type of what is in lists, and in lists of lists; that of others is their own."""
    return element_type(type_.value_type) if is_list(type_) else type_


class _Cells:
    """The files and blocks that were read last, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, int, int], tuple[pq.ParquetFile, list[int], dict[str, Column]]]
        self._files = OrderedDict()
        self._blocks: OrderedDict[tuple[Any, ...], pa.RecordBatch] = OrderedDict()
        # The row group that is being read, and the number of its next block: rows mostly come in order.
        self._reading: tuple[tuple[Any, ...], Iterator[pa.RecordBatch]] | None = None
        self._next = 0

    def read(self, path: str, column: str, row: int) -> bytes | None:
        with self._lock:
            key, file, stops, columns = self._open(path)
            group = bisect_right(stops, row)
            if group == len(stops):
                raise IndexError(row)
            place = row - (stops[group - 1] if group else 0)
            found, of_list = _find(columns, column)
            is_struct = of_list is None and pa.types.is_struct(found.type)
            leaf = f"{found.leaf}.bytes" if is_struct else found.leaf
            number, place = divmod(place, block_rows(file, [leaf], group))
            values, _ = flat_values(self._block(file, leaf, (*key, leaf, group), number).slice(place, 1), found)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        value: bytes | None = values[of_list or 0].as_py()
        return value

    def _open(self, path: str) -> tuple[tuple[str, int, int], pq.ParquetFile, list[int], dict[str, Column]]:
        """What tells this file from a later one of the same name, the file, where each of its row groups stops, and its
        columns."""
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
    # Files of the parent share their position with it, and its lock may be held for ever.
    os.register_at_fork(after_in_child=forget_cells)


def _find(columns: dict[str, Column], name: str) -> tuple[Column, int | None]:
    """The column NAME, or for NAME[N] that and N. Raises KeyError."""
    match = None if name in columns else _PLACE.fullmatch(name)
    return (columns[match[1]], int(match[2])) if match else (columns[name], None)


def _footer_bytes(source: BinaryIO) -> int:
    source.seek(max(0, source.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return int.from_bytes(source.read()[-8:-4], "little")


def _other_kind(path: str) -> str | None:
    try:
        head = storage.read_bytes(path, 0, HEAD_BYTES)
    except OSError:
        return None
    return None if head.startswith(_MAGIC) else describe(head)


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
