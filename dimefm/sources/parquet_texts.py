"""Sentences in a column of Parquet files."""

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
    read_blocks,
)
from dimefm.sources.text_lines import clean, report_replaced, why_nothing_left
from dimefm.sources.walk_folder import cannot_read


class ParquetTexts:
    """A Parquet file with a column of strings, or of lists of strings, each of which is a sentence. The column may be a
    field of structs, or of structs in lists: COLUMN.FIELD. The key is file:row, and in lists file:row:N."""

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def check(self) -> None:
        """Raises SourceError where the file has no such column, or without one none that is known to hold sentences."""
        try:
            self._column_of(open_parquet(self._path))
        except (OSError, MemoryError, DamagedParquetError):
            return  # it is reported with the samples

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every value that is text and not blank, in order, read a block at a time. Raises as `check`."""
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
        """Those of a batch that has `before` rows before it."""
        name = self._path.rpartition("/")[2]
        values, rows_N = flat_values(batch, column)
        if rows_N is not None and len(empty := np.setdiff1d(np.arange(len(batch)), rows_N)):
            reason = "rows of Parquet files without a sentence in their list"
            account.skip(reason, f"{self._path}, row {before + empty[0]}", len(empty))
        rows = range(len(batch)) if rows_N is None else rows_N.tolist()
        place, previous = 0, -1
        for row, value in zip(rows, as_strings(values), strict=True):
            place, previous = (place + 1 if row == previous else 0), row
            if value is None:
                account.skip("rows of Parquet files that are null", f"{self._path}, row {before + row}")
            elif not (text := clean(value)):
                account.skip(f"rows of Parquet files {why_nothing_left(value)}", f"{self._path}, row {before + row}")
            else:
                key = f"{name}:{before + row}"
                yield TextSample(key if rows_N is None else f"{key}:{place}", text)

    def _column_of(self, file: pq.ParquetFile) -> Column:
        """Columns of bytes, as some programs write strings, and of nothing but null, are taken only by their name."""
        wanted = DEFAULT_COLUMNS if self._column is None else (self._column,)
        columns = columns_of(file.schema_arrow)
        kinds = {name: element_type(column.type) for name, column in columns.items()}
        names = [
            name
            for name, kind in kinds.items()
            if is_string(kind) or (name in wanted and (is_bytes(kind) or pa.types.is_null(kind)))
        ]
        other = next((name for name in wanted if name in kinds), None)
        if other is not None and not any(name in names for name in wanted):
            what = f"{self._path}: column {other!r} holds {str(kinds[other])[:200]}, not strings"
            remedy = f"name a column of strings with --column NAME; there is: {', '.join(names) or 'none'}"
            raise NoColumnError(
                what, f"{self._path}, which has {', '.join(names) or 'no column of strings'}", remedy=remedy
            )
        return columns[choose_column(names, self._column, self._path)]
