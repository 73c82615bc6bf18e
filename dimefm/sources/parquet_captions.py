"""Captions in a column of Parquet files with images: strings, or lists of strings.

Shapes: N values of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.caption_reader import CaptionReader
from dimefm.sources.parquet import Column, as_strings, columns_of, element_type, flat_values, is_bytes, is_string
from dimefm.system.near_names import did_you_mean

CaptionsByRow = dict[int, tuple[str, ...]]
"""The captions of rows of a block, by the number of the row in it."""


def caption_column(
    file: pq.ParquetFile, path: str, name: str | None, account: Account, *, found: bool
) -> Column | None:
    """The column of captions called `name`; None where none is asked for. Raises SourceError where the file does not
    have it; a file that was `found` in a folder is counted then."""
    if name is None:
        return None
    columns = columns_of(file.schema_arrow)
    column = columns.get(name)
    if column and (is_string(element_type(column.type)) or is_bytes(element_type(column.type))):
        return column
    there = [other for other, one in columns.items() if is_string(element_type(one.type))]
    if found:
        reason = f"Parquet files without a column {name!r} of captions (their images are used)"
        account.skip(reason, f"{path}, which has {', '.join(there) or 'no column of strings'}")
        return None
    what = f"{path} has no column {name!r} of captions, which are strings or lists of strings"
    near = did_you_mean(name, there, f"there is {', '.join(there) or 'none'}")
    raise SourceError(what, remedy=f"name the column with --captions: {near}")


def captions_by_row(
    path: str, before: int, batch: pa.RecordBatch, column: Column | None, reader: CaptionReader
) -> CaptionsByRow:
    """The captions of a block that has `before` rows before it in its file."""
    if column is None:
        return {}
    values, rows_N = flat_values(batch, column)
    rows: list[int] = (np.arange(len(batch)) if rows_N is None else rows_N).tolist()
    found: dict[int, list[str | None]] = {}
    for row, value in zip(rows, as_strings(values), strict=True):
        found.setdefault(row, []).append(value)
    return {row: reader.of_values(several, f"{path}, row {before + row}") for row, several in found.items()}


def of_single_images(
    captions: CaptionsByRow, rows: Sequence[int], path: str, before: int, account: Account
) -> CaptionsByRow:
    """The captions of rows with one image in their list; `rows` are those of the images. The captions of other rows may
    be of any of their images, and are counted."""
    images = Counter(rows)
    for row in [row for row in captions if images[row] > 1]:
        reason = "captions of rows of Parquet files with several images"
        account.skip(reason, f"{path}, row {before + row}", len(captions[row]))
    return {row: several for row, several in captions.items() if images[row] == 1}
