"""Sentences in a column of Parquet files.

Shapes: N values of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.plan import SourceFile
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.json_fields import DEFAULT_COLUMNS, NoColumnError, choose_column
from dimefm.sources.parquet import (
    Column,
    DamagedParquetError,
    as_strings,
    columns_of,
    describe_damage,
    element_type,
    flat_values,
    is_bytes,
    is_string,
    open_parquet,
    places_in_lists,
    read_blocks,
)
from dimefm.sources.text_lines import clean, report_replaced, why_nothing_left
from dimefm.sources.walk_folder import cannot_read


class ParquetTexts:
    """A Parquet file with a column of strings, or of lists of strings, each of which is a sentence. The column may be a
    field of structs, or of structs in lists: COLUMN.FIELD. The key is file:row, or in a list file:row:N."""

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def check(self) -> None:
        """Raises SourceError where the file does not have the column, or, without one, none of the default columns."""
        try:
            self._column_of(open_parquet(self._path))
        except (OSError, MemoryError, DamagedParquetError):
            return  # this is reported when the samples are listed

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every value that is text and not blank, in order; others are counted. Read a block at a time. Raises as
        `check`."""
        rows = replaced = 0
        try:
            file = open_parquet(self._path)
            column = self._column_of(file)
            for group in range(file.metadata.num_row_groups):
                for batch in read_blocks(file, [column.leaf], group):
                    for sample in self._sentences(batch, column, rows, account):
                        if "\ufffd" in sample.text:
                            replaced += 1
                        yield sample
                    rows += len(batch)
            if rows == 0:
                account.skip("Parquet files without rows", self._path)
        except DamagedParquetError as error:
            account.problem(describe_damage(self._path, rows, error))
        except (OSError, MemoryError) as error:
            raise cannot_read(self._path, error) from error
        report_replaced(self._path, "sentences", replaced, account)

    def _sentences(self, batch: pa.RecordBatch, column: Column, before: int, account: Account) -> Iterator[TextSample]:
        """The sentences of a batch that has `before` rows before it in the file."""
        name = self._path.rpartition("/")[2]
        values, rows_N = flat_values(batch, column)
        in_lists = rows_N is not None
        if rows_N is None:
            rows_N = np.arange(len(batch))
        elif len(empty := np.setdiff1d(np.arange(len(batch)), rows_N)):
            reason = "rows of Parquet files without a sentence in their list"
            account.skip(reason, f"{self._path}, row {before + empty[0]}", len(empty))
        rows: list[int] = rows_N.tolist()
        for row, place, value in zip(rows, places_in_lists(rows), as_strings(values), strict=True):
            if value is None:
                account.skip("rows of Parquet files that are null", f"{self._path}, row {before + row}")
            elif text := clean(value):
                key = f"{name}:{before + row}"
                yield TextSample(f"{key}:{place}" if in_lists else key, text)
            else:
                account.skip(f"rows of Parquet files {why_nothing_left(value)}", f"{self._path}, row {before + row}")

    def _column_of(self, file: pq.ParquetFile) -> Column:
        """The column of sentences. One of bytes, as some programs write strings, and one of nothing but null are taken
        only by their name."""
        wanted = DEFAULT_COLUMNS if self._column is None else (self._column,)
        columns = columns_of(file.schema_arrow)
        types = {name: element_type(column.type) for name, column in columns.items()}
        names = [
            name
            for name, type_ in types.items()
            if is_string(type_) or (name in wanted and (is_bytes(type_) or pa.types.is_null(type_)))
        ]
        unusable = next((name for name in wanted if name in types), None)
        if unusable is not None and not any(name in names for name in wanted):
            what = f"{self._path}: column {unusable!r} holds {str(types[unusable])[:200]}, not strings"
            remedy = f"name a column of strings with --column NAME; there is: {', '.join(names) or 'none'}"
            example = f"{self._path}, which has {', '.join(names) or 'no column of strings'}"
            raise NoColumnError(what, example, remedy=remedy)
        return columns[choose_column(names, self._column, self._path)]
