"""Read columns of Parquet files forward and in bounded memory, to list what they hold. parquet_cells reads by row.

Shapes: N values of a block.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dimefm.sources.files import open_seekable
from dimefm.system import storage
from dimefm.system.first_bytes import HEAD_BYTES, describe

SUFFIX = ".parquet"
COLUMN_MARK = f"{SUFFIX}#"
"""What stands before the column in the name of a Parquet file with images, PATH.parquet#COLUMN."""
BLOCK_BYTES, _BLOCK_ROWS = 32 << 20, 8192
"""The most that is read of a row group at a time, in bytes and rows."""

_BUFFER = 1 << 20  # bytes of a column chunk that are read ahead; without a buffer the chunk is read whole

_STRINGS = {kind().id for kind in (pa.string, pa.large_string, pa.string_view)}
_BYTES = {pa.binary(1).id, *(kind().id for kind in (pa.binary, pa.large_binary, pa.binary_view))}
_LISTS = {pa.list_(pa.null(), 1).id} | {
    kind(pa.null()).id for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
}
_MAGIC = b"PAR1"
_TAIL_BYTES = 1 << 16  # Arrow reads this many first; they end with the length of the footer and _MAGIC
_SIGNATURE_BYTES = 28  # at the end of a footer that is plain although columns are encrypted


class DamagedParquetError(Exception):
    """A Parquet file that cannot be understood: it was cut short, is encrypted, or is something else."""


class Column(NamedTuple):
    """A column, or a field of the structs in a column."""

    fields: tuple[str, ...]
    """The names that lead to it from the top."""
    type: pa.DataType
    leaf: str
    """What is read of the file for it, as Parquet names it."""
    in_list: bool = False
    """Whether the structs are in a list, so that a row may have several of them or none."""


def split_column(file: str) -> tuple[str, str | None]:
    """Path and column of an image that a plan names as PATH.parquet#COLUMN; no column for any other file."""
    path, mark, column = file.partition(COLUMN_MARK)
    return (path + SUFFIX, column) if mark else (file, None)


def open_parquet(path: str) -> pq.ParquetFile:
    """The file, with its footer read. Raises OSError, MemoryError or DamagedParquetError."""
    source, is_url = open_seekable(path), storage.is_url(path)
    footer_bytes = _footer_bytes(source)
    if not is_url:
        source.close()
    try:
        file = pq.ParquetFile(source if is_url else path, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        found = _storage_or_damage(error)
        if isinstance(found, DamagedParquetError) and (what := other_kind(path)):
            found = DamagedParquetError(f"it is {what}")
        raise found from error
    if footer_bytes - file.metadata.serialized_size == _SIGNATURE_BYTES:  # Arrow aborts at an encrypted column
        raise DamagedParquetError("it is encrypted")
    return file


def columns_of(schema: pa.Schema) -> dict[str, Column]:
    """Every column by its name, and after them every field of structs, as COLUMN.FIELD. Columns that share a name are
    left out: none of them can be named."""
    found: dict[str, Column] = {}
    times = Counter(schema.names)
    level = [Column((field.name,), field.type, field.name) for field in schema if times[field.name] == 1]
    while level:
        for column in level:
            found.setdefault(".".join(column.fields), column)
        level = [field for column in level for field in _fields_of(column)]
    return found


def _fields_of(column: Column) -> list[Column]:
    """The fields of a column of structs, or of lists of them; none of other columns."""
    structs = element_type(column.type)
    if not pa.types.is_struct(structs):
        return []
    in_list = column.in_list or is_list(column.type)
    leaves = [column.leaf if in_list else f"{column.leaf}.{field.name}" for field in structs]
    return [
        Column((*column.fields, field.name), field.type, leaf, in_list)
        for field, leaf in zip(structs, leaves, strict=True)
    ]


def hugging_face_features(schema: pa.Schema) -> dict[str, Any]:
    """The types of columns by Hugging Face's metadata; empty where there is none, or none that can be understood."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def describe_damage(path: str, rows: int, error: Exception) -> str:
    """The problem with a file of which only the first `rows` can be read, in a line."""
    return f"{path}: broken after {rows} rows ({error}); what follows is lost" if rows else f"{path}: broken: {error}"


def read_blocks(file: pq.ParquetFile, columns: list[str], group: int) -> Iterator[pa.RecordBatch]:
    """These columns (or fields of struct columns, COLUMN.FIELD) of a row group, in blocks of `rows_per_block` rows.

    Raises OSError, MemoryError and DamagedParquetError.
    """
    try:
        # One thread: workers of a DataLoader are forked, and have none of the threads of Arrow's pool.
        yield from file.iter_batches(rows_per_block(file, columns, group), [group], columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _storage_or_damage(error) from error


def rows_per_block(file: pq.ParquetFile, columns: list[str], group: int) -> int:
    """Rows of a block: as many as have BLOCK_BYTES in these columns, by the mean of the row group, and at least one."""
    facts = file.metadata.row_group(group)
    chunks = (facts.column(i) for i in range(facts.num_columns))
    size: int = sum(c.total_uncompressed_size for c in chunks if _is_within(c.path_in_schema, columns))
    rows = int(facts.num_rows)
    return max(1, min(_BLOCK_ROWS, rows, BLOCK_BYTES * rows // max(1, size)))


def flat_values(batch: pa.RecordBatch, column: Column) -> tuple[pa.Array, np.ndarray[Any, Any] | None]:
    """The values of a column in a block. Where it holds lists: the values in them, and the row in the block of each
    value, int64 (N,)."""
    values, rows_N = batch.column(column.fields[0]), None
    for name in (*column.fields[1:], None):
        while is_list(values.type):
            lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
            rows_N = np.repeat(np.arange(len(values)) if rows_N is None else rows_N, lengths)
            values = values.flatten()
        values = values if name is None else pc.struct_field(values, name)
    return values, rows_N


def places_in_lists(rows: Sequence[int]) -> Iterator[int]:
    """For values in lists, given the row of each: the place of each in its list, counted from 0."""
    place, previous = 0, -1
    for row in rows:
        place, previous = (place + 1 if row == previous else 0), row
        yield place


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
    """The length of each value, which is bytes; None for null."""
    if pa.types.is_dictionary(values.type):
        known = pc.binary_length(values.dictionary.cast(pa.large_binary())).take(values.indices)
    else:
        known = pc.binary_length(values.cast(pa.large_binary()))
    found: list[int | None] = known.to_pylist()
    return found


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
    """Whether values of this type are read as lists; those of a map are not."""
    return type_.id in _LISTS


def element_type(type_: pa.DataType) -> pa.DataType:
    """The type of the elements if these are lists, or lists of lists; else the type itself."""
    return element_type(type_.value_type) if is_list(type_) else type_


def _footer_bytes(source: BinaryIO) -> int:
    source.seek(max(0, source.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return int.from_bytes(source.read()[-8:-4], "little")


def other_kind(path: str) -> str | None:
    """What a file is by its first bytes, if it is of a known kind other than Parquet."""
    try:
        head = storage.read_bytes(path, 0, HEAD_BYTES)
    except OSError:
        return None
    return None if head.startswith(_MAGIC) else describe(head)


def _is_within(path: str, columns: list[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _storage_or_damage(error: Exception) -> Exception:
    """The error to raise for one of Arrow's: its own errors, and the OSErrors without a number that it raises for pages
    it cannot read, mean damage; others are the storage's or the machine's."""
    if isinstance(error, MemoryError):  # ArrowMemoryError is one, and an ArrowException too
        return MemoryError(str(error))
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        return error
    return DamagedParquetError(str(error).strip().split("\n")[0])
