"""Sentences in a field or column of .jsonl, .csv and .tsv files.

A value that is no text costs its line, never the file, and is counted.
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

_HEAD = 100  # JSON objects that are looked at for their fields
_SEPARATOR = re.compile("\ufeff?sep=(.)\r?\n")
_LONGEST_RECORD = 1000  # lines; a longer one is likely a quote that is never closed


class Table:
    """What the kinds share: the file, the column, and how their samples are counted and reported."""

    unit = "line"

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column
        self._name, self._encoding = file.path.rpartition("/")[2], ""

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def check(self) -> None:
        """Raises SourceError where the file has no such column, or without one none that is known to hold sentences."""
        try:
            self._open_and_check()
        except (*READ_ERRORS, NotTextError):
            return  # it is reported with the samples

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every value that is text and not blank, in order; the key is file:line, and in lists file:line:N. Others are
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
        raise NotImplementedError

    def _values(self, account: Account) -> Iterator[FieldValue]:
        raise NotImplementedError


class JsonLines(Table):
    """A .jsonl or .jsonl.gz file: an object a line, the sentence in one of its fields, or several in a list."""

    def _open_and_check(self) -> None:
        self._field()

    def _field(self) -> str:
        """The field, by the first hundred objects; nothing where there is no object."""
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
    """A .csv file, with quotes, and commas, semicolons, bars or tabs between columns, or a .tsv file, with quotes or
    without (see quoted.tsv_rows); either as .gz too. The first line is a header with the names of the columns, unless
    `column` is a number: that column, counted from 0, of a file without a header."""

    def _open_and_check(self) -> None:
        for _ in self._values(Account()):
            return

    def _values(self, account: Account) -> Iterator[FieldValue]:
        number_of_column = self._column if self._column is not None and self._column.isdecimal() else None
        tabs = self._path.lower().removesuffix(".gz").endswith(".tsv")
        with open_text(self._path) as file:
            self._encoding = encoding_of(file)
            if tabs:
                rows = tsv_rows(file, header=number_of_column is None)
            else:
                rows = self._csv_rows(file, header=number_of_column is None)
            place = self._place(rows) if number_of_column is None else int(number_of_column)
            reported = False
            for number, lines, row in rows:
                if place < len(row):
                    yield str(number), row[place], ""
                elif any(row):
                    yield str(number), None, "with too few columns"
                else:
                    yield str(number), "", ""
                if lines > _LONGEST_RECORD and not reported:
                    reported = True
                    what = f"the record of line {number} goes on for {lines - 1} lines; an open quote?"
                    account.problem(f"{self._path}: {what}")

    def _csv_rows(self, file: TextIO, *, header: bool) -> Iterator[Row]:
        """The rows of a .csv. Its first line may say what is between the columns, as Excel writes it: sep=;"""
        first = next(file, "")
        if match := _SEPARATOR.fullmatch(first):
            return ((number + 1, lines, row) for number, lines, row in csv_rows(file, match[1]))
        wanted = DEFAULT_COLUMNS if self._column is None else (self._column,)
        return csv_rows(chain([first], file), delimiter_of(first, wanted) if header else ",")

    def _place(self, rows: Iterator[Row]) -> int:
        """Of the first row that is not blank, which is the header."""
        header = next((row for _, _, row in rows if any(row)), None)
        if header is None:
            return 0
        names = [name.strip() for name in header]
        return names.index(choose_column(names, self._column, self._path, ", or a number for a file without a header"))


def parse_json_line(line: str) -> Any:
    """The value of a line of JSON; None where it is none."""
    try:
        return json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None
