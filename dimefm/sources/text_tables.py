"""Sentences in a field or column of .jsonl, .csv and .tsv files.

A value that is not text is counted, and the file is read on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, TextIO

from cache_schemas.plan import SourceFile
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.json_fields import DEFAULT_COLUMNS, FieldValue, choose_column, field_names, values_at
from dimefm.sources.quoted_rows import Row, csv_rows, delimiter_of, tsv_rows
from dimefm.sources.text_lines import (
    READ_ERRORS,
    NotTextError,
    clean,
    encoding_of,
    open_text,
    reporting,
    why_nothing_left,
)

_HEAD = 100  # JSON objects that are searched for their fields
_SEPARATOR = re.compile("\ufeff?sep=(.)\r?\n")
_LONGEST_RECORD = 1000  # lines; a longer one is likely a quote that is never closed


class Table:
    """A file with a column of sentences: how its samples are named, counted and reported, whatever kind it is."""

    unit = "line"
    """What the file consists of."""

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column
        self._name, self._encoding = file.path.rpartition("/")[2], ""

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def check(self) -> None:
        """Raises SourceError where the file does not have the column, or, without one, none of the default columns."""
        try:
            self._open_and_check()
        except (*READ_ERRORS, NotTextError):
            return  # it is reported with the samples

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every value that is text and not blank, in order; the key is file:line, or in a list file:line:N. Others are
        counted. Raises as `check`."""
        with reporting(self._path, self.unit, account) as reading:
            for place, value, why in self._values(account):
                reading.place, reading.encoding = place, self._encoding
                if value is None:
                    account.skip(f"{self.unit}s {why}", f"{self._path}:{place}")
                elif text := clean(value):
                    if "\ufffd" in value:
                        reading.replaced += 1
                    yield TextSample(f"{self._name}:{place}", text)
                else:
                    account.skip(f"{self.unit}s {why_nothing_left(value)}", f"{self._path}:{place}")

    def _open_and_check(self) -> None:
        """Find the column. Raises NoColumnError, READ_ERRORS and NotTextError."""
        raise NotImplementedError

    def _values(self, account: Account) -> Iterator[FieldValue]:
        """What the column holds, line by line; sets `_encoding`. Raises as `_open_and_check`."""
        raise NotImplementedError


class JsonLines(Table):
    """A .jsonl or .jsonl.gz file: an object per line, with a sentence, or a list of them, in one of its fields."""

    def _open_and_check(self) -> None:
        self._field()

    def _field(self) -> str:
        """The field, chosen by the first hundred objects; empty where there is no object."""
        with open_text(self._path) as file:
            objects = (value for value in map(parse_json_line, file) if isinstance(value, dict))
            names = field_names(islice(objects, _HEAD))
        return choose_column(names, self._column, self._path) if names else ""

    def _values(self, account: Account) -> Iterator[FieldValue]:
        field = self._field()
        with open_text(self._path) as file:
            self._encoding = encoding_of(file)
            for number, line in enumerate(file, 1):
                value = parse_json_line(line)
                if isinstance(value, dict):
                    yield from values_at(value, field, str(number))
                elif line.strip() and "\0" not in line:
                    yield str(number), None, "that are no JSON object"
                else:
                    yield str(number), line, ""


class Delimited(Table):
    """A .csv file, with quotes, and commas, semicolons, bars or tabs between columns, or a .tsv file, with or without
    quotes (see quoted_rows.tsv_rows); either may end in .gz too. The first row is a header with the names of the
    columns, unless `column` is a number, counted from 0: then the file has no header."""

    def _open_and_check(self) -> None:
        next(self._values(Account()), None)

    def _values(self, account: Account) -> Iterator[FieldValue]:
        has_header = self._column is None or not self._column.isdecimal()
        with open_text(self._path) as file:
            self._encoding = encoding_of(file)
            is_tsv = self._path.lower().removesuffix(".gz").endswith(".tsv")
            rows = tsv_rows(file, header=has_header) if is_tsv else self._csv_rows(file, header=has_header)
            column = self._column_by_header(rows) if has_header else int(self._column or 0)
            reported = False
            for number, lines, cells in rows:
                if column < len(cells):
                    yield str(number), cells[column], ""
                elif any(cells):
                    yield str(number), None, "with too few columns"
                else:
                    yield str(number), "", ""  # a blank line
                if lines > _LONGEST_RECORD and not reported:
                    reported = True
                    what = f"the record of line {number} goes on for {lines - 1} lines; an open quote?"
                    account.problem(f"{self._path}: {what}")

    def _csv_rows(self, file: TextIO, *, header: bool) -> Iterator[Row]:
        """The rows of a .csv. Its first line may name what separates the columns, as Excel writes it: sep=;"""
        first = next(file, "")
        if match := _SEPARATOR.fullmatch(first):
            return ((number + 1, lines, row) for number, lines, row in csv_rows(file, match[1]))
        wanted = DEFAULT_COLUMNS if self._column is None else (self._column,)
        return csv_rows(chain([first], file), delimiter_of(first, wanted) if header else ",")

    def _column_by_header(self, rows: Iterator[Row]) -> int:
        """The number of the column by its name in the header, which is the first row that is not blank."""
        header = next((cells for _, _, cells in rows if any(cells)), None)
        if header is None:
            return 0
        names = [name.strip() for name in header]
        return names.index(choose_column(names, self._column, self._path, ", or a number for a file without a header"))


def parse_json_line(line: str) -> Any:
    """The value that a line of JSON stands for; None where it is not JSON."""
    try:
        return json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None
