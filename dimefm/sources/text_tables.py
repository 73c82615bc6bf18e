"""Sentences in a field or column of .jsonl, .csv and .tsv files.

A value that is no text costs its line, never the file: such lines are counted, and reported once for each file.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import SourceFile, TextSample
from dimefm.sources.files import open_forward, require_damage

DEFAULTS = ("text", "caption", "sentence", "TEXT")
_HEAD = 100  # JSON objects that are looked at for their fields
_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KB
_LONGEST_RECORD = 1000  # lines; a longer one is likely a quote that is never closed
_SURROGATE = re.compile("[\ud800-\udfff]")
_BROKEN = (EOFError, zlib.error, OSError, MemoryError, csv.Error)

_Value = tuple[int, str | None, str]
"""The number of a line or row, its text, and where that is None why there is none."""


class _Table:
    """What the kinds share: the file, the column, and how their samples are counted and reported."""

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column
        self._name = file.path.rpartition("/")[2]

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def check(self) -> None:
        """Raises SourceError where the file has no such column, or without one none that is known to hold sentences."""
        try:
            self._open_and_check()
        except _BROKEN:
            return  # it is reported with the samples

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every value that is text and not blank, in order; the key is file:line. Raises as `check`."""
        line, skipped, first, broken = 0, 0, "", 0
        try:
            for line, value, why in self._values(account):
                if value is None:
                    skipped, first = skipped + 1, first or f"{self.unit} {line} to begin with: {why}"
                    continue
                broken += "\ufffd" in value
                if text := _clean(value):
                    yield TextSample(f"{self._name}:{line}", text)
        except _BROKEN as error:
            require_damage(self._path, error)
            account.problem(f"{self._path}: broken after {self.unit} {line} ({error}); what follows is lost")
        if skipped:
            account.problem(f"{self._path}: {skipped} {self.unit}s are passed over ({first})")
        if broken:
            account.problem(f"{self._path}: {broken} {self.unit}s are not UTF-8; the bad bytes were replaced")

    unit = "line"

    def _open_and_check(self) -> None:
        raise NotImplementedError

    def _values(self, account: Account) -> Iterator[_Value]:
        raise NotImplementedError


class JsonLines(_Table):
    """A .jsonl or .jsonl.gz file: an object a line, the sentence in one of its fields."""

    def _open_and_check(self) -> None:
        self._field()

    def _field(self) -> str | None:
        """The field, by the first hundred objects; None where there is no object."""
        names: dict[str, None] = {}
        with open_forward(self._path) as file:
            objects = (value for value in map(_parsed, file) if isinstance(value, dict))
            for value in islice(objects, _HEAD):
                names.update(dict.fromkeys(value))
        return _choose(list(names), self._column, self._path) if names else None

    def _values(self, account: Account) -> Iterator[_Value]:
        field = self._field()
        with open_forward(self._path) as file:
            for number, line in enumerate(file, 1):
                value = _parsed(line)
                if isinstance(value, dict):
                    text = value.get(field)
                    why = f"{field!r} is not a string" if field in value else f"there is no {field!r}"
                    yield number, text if isinstance(text, str) else None, why
                elif line.strip():
                    yield number, None, "not a JSON object"


class Delimited(_Table):
    """A .csv file, with quotes, or a .tsv file, without; either as .gz too. The first line is a header with the names
    of the columns, unless `column` is a number: that column, counted from 0, of a file without a header."""

    def _open_and_check(self) -> None:
        for _ in self._values(Account()):
            return

    def _values(self, account: Account) -> Iterator[_Value]:
        csv.field_size_limit(_LONGEST_FIELD)
        tabs = self._path.removesuffix(".gz").endswith(".tsv")
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        with open_forward(self._path) as file:
            reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline=""), **options)
            place = self._place(reader)
            number, reported = reader.line_num + 1, False
            for row in reader:
                if place < len(row):
                    yield number, row[place], ""
                elif row:
                    yield number, None, f"it ends after column {len(row) - 1}, counted from 0"
                if reader.line_num - number > _LONGEST_RECORD and not reported:
                    reported = True
                    lines = reader.line_num - number
                    account.problem(
                        f"{self._path}: the record of line {number} goes on for {lines} lines; an open quote?"
                    )
                number = reader.line_num + 1

    def _place(self, reader: Iterator[list[str]]) -> int:
        if self._column is not None and self._column.isdecimal():
            return int(self._column)
        names = [name.strip() for name in next(reader, [])]
        if not names:
            return 0
        return names.index(_choose(names, self._column, self._path, ", or a number for a file without a header"))


def _choose(names: list[str], column: str | None, path: str, or_else: str = "") -> str:
    """`column`, or the first of DEFAULTS that is there. Raises SourceError with what is there."""
    wanted = DEFAULTS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    there = ", ".join(names) or "no column of strings"
    what = f"{path} has no column {' or '.join(map(repr, wanted))}; there is: {there}"
    raise SourceError(what, remedy=f"name the column with the sentences: --column NAME{or_else}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None


def _clean(text: str) -> str:
    """White space as single spaces; half a surrogate pair, which JSON can write and UTF-8 cannot, as U+FFFD."""
    if not text.isascii():
        text = _SURROGATE.sub("\ufffd", text)
    return " ".join(text.split())
