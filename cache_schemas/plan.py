"""rows/<shard>.parquet: which sample each row is. One file per shard, written before any work and never changed.

rows/files.parquet beside them lists the files that the plan was made from, as they were then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache_schemas.problems import Problem, SchemaError


class SourceFile(NamedTuple):
    """One file of a source: absolute path or URL, size in bytes, and when it was last changed, in nanoseconds since
    1970 (whole seconds for a URL, 0 where that is not known)."""

    path: str
    size: int
    modified: int


IMAGE_PLAN = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # absolute path or URL; a Parquet file with #COLUMN
        pa.field("offset", pa.int64(), nullable=False),  # in bytes; in a Parquet file, the row
        pa.field("size", pa.int64(), nullable=False),  # in bytes; in a .tsv, of the base64 text
    ]
)
CAPTIONS = "captions"
"""A further column of a plan of images whose captions were asked for: a list of strings, each as a text plan has it."""
CAPTIONED_PLAN = IMAGE_PLAN.append(pa.field(CAPTIONS, pa.list_(pa.string()), nullable=False))
TEXT_PLAN = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)


class PlannedImage(NamedTuple):
    """A row of IMAGE_PLAN. `crash` is not stored: it is the reason why this image must not be decoded here, because it
    ended the process that tried (caching.crashing_images)."""

    row: int
    key: str
    file: str
    offset: int
    size: int
    crash: str | None = None


class PlannedText(NamedTuple):
    """A row of TEXT_PLAN."""

    row: int
    key: str
    text: str


FILES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes
        pa.field("modified", pa.int64(), nullable=False),  # nanoseconds since 1970, 0 where not known
    ]
)
FILES_TABLE = "rows/files.parquet"
PLANS = {"image": IMAGE_PLAN, "text": TEXT_PLAN}


def planned_rows(table: pa.Table) -> list[Any]:
    """The rows of a plan, each a PlannedImage or a PlannedText, by its columns."""
    schema, kind = (TEXT_PLAN, PlannedText) if "text" in table.column_names else (IMAGE_PLAN, PlannedImage)
    return [kind(*values) for values in zip(*(table[name].to_pylist() for name in schema.names), strict=True)]


def parse_plan(
    table: pa.Table, kind: str, start: int, stop: int, where: str, columns: tuple[str, ...] = ()
) -> pa.Table:
    """Return the plan of one shard after a check: its columns are right (only `columns`, if no others were read), and
    its rows, if they were read, are exactly start..stop-1 in order.

    Raises SchemaError with every problem.
    """
    problems = []
    for field in PLANS[kind]:
        if columns and field.name not in columns:
            continue
        index = table.schema.get_field_index(field.name)
        if index < 0:
            problems.append(Problem(field.name, "missing column"))
        elif (found := _value_type(table.schema.field(index).type)) != field.type:
            problems.append(Problem(field.name, f"expected {field.type}, found {found}"))
    if table.num_rows != stop - start:
        problems.append(Problem("row", f"expected {stop - start} rows, found {table.num_rows}"))
    elif (
        not problems
        and "row" in table.column_names
        and not np.array_equal(table["row"].to_numpy(), np.arange(start, stop))
    ):
        problems.append(Problem("row", f"must count from {start} to {stop - 1} in order"))
    if problems:
        raise SchemaError(where, f"{kind} plan", problems)
    return table


def _value_type(type_: pa.DataType) -> pa.DataType:
    """The type of a column's values, also if they were read as a dictionary."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_
