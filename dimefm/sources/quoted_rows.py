"""Rows of tables whose cells may be in quotes: CSV, and TSV, which some programs write with quotes and some without."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KB
_MOST_LINES = 1000  # that one row of a TSV may span
_QUOTED = r'"(?:[^"]|"")*"'
_CELL = re.compile(rf'(?:^|\t)({_QUOTED}|[^"\t\n]*)')
_ROW = re.compile(rf'(?:{_QUOTED}|[^"\t\n]*)(?:\t(?:{_QUOTED}|[^"\t\n]*))*')
_NEEDS_QUOTES = re.compile(r'["\t\r\n]')

Row = tuple[int, int, list[str]]
"""The number of a row's first line, counted from 1; how many lines it has; and its cells, none for a blank line."""


def csv_rows(lines: Iterator[str], delimiter: str = ",") -> Iterator[Row]:
    """Rows of a CSV, in which quotes may hold anything. A carriage return that ends no line is white space. Raises
    csv.Error, also for a quote that is still open at the end."""
    csv.field_size_limit(_LONGEST_FIELD)
    all_read = False

    def plain_lines() -> Iterator[str]:
        nonlocal all_read
        yield from (_without_returns(line) if "\r" in line else line for line in lines)
        all_read = True

    reader = csv.reader(plain_lines(), delimiter=delimiter)
    number = 1
    for row in reader:
        if all_read:  # the reader asks for a line beyond the last one only within quotes
            raise csv.Error(f"a quote that is opened in line {number}, or after it, is never closed")
        yield number, reader.line_num + 1 - number, row
        number = reader.line_num + 1


def delimiter_of(header: str, wanted: Sequence[str]) -> str:
    """What separates the columns of a CSV, by the names in its first line: the first of comma, semicolon, bar and tab
    by which one of the `wanted` names is a column, or else the one that makes the most columns."""
    names = {
        mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])]
        for mark in (",", ";", "|", "\t")
    }
    known = (mark for mark, columns in names.items() if any(name in wanted for name in columns))
    return next(known, None) or max(names, key=lambda mark: len(names[mark]))


def tsv_rows(lines: Iterator[str], *, header: bool) -> Iterator[Row]:
    """Rows of a TSV. Quotes are part of the text, except in a row that pandas, Excel or the csv module wrote with
    quotes, because cells of it hold tabs, quotes or line ends.

    Such a row has quotes only around whole cells, with those within a cell doubled, and at least one of these cells
    needs them. It has as many cells as the first row. If it spans several lines, these would not all be rows of that
    many cells without quotes. Where the file has a `header`, and each name in it is in quotes, it is read as a CSV with
    tabs.
    """
    first = next(lines, "")
    names = _without_end(first).split("\t")
    if header and all(len(name) > 1 and name[0] == name[-1] == '"' for name in names):
        yield from csv_rows(chain([first], lines), "\t")
        return
    ahead = deque([first] if first else [])  # lines that were read and do not belong to a row yet
    number, width = 1, 0  # of the next row; cells of the first row that is not blank
    while line := (ahead.popleft() if ahead else next(lines, "")):
        cells, taken = None, 1
        if '"' in line and (line[0] == '"' or '\t"' in line):
            following = _lines_until_closed(line, ahead, lines)
            cells = _quoted_cells([line, *following], width)
            if cells is not None:
                taken += len(following)
                for _ in following:
                    ahead.popleft()
        if cells is None:
            cells = _without_end(line).split("\t")
        yield number, taken, cells
        number += taken
        if not width and any(cells):
            width = len(cells)


def _lines_until_closed(line: str, ahead: deque[str], lines: Iterator[str]) -> list[str]:
    """The lines that follow `line` until as many quotes are closed as opened, which are one row with it if the quotes
    are those of cells. They stay in `ahead`, where those not yet read are put."""
    is_open, following = line.count('"') % 2, list[str]()
    while is_open and len(following) < _MOST_LINES:
        if len(following) == len(ahead):
            if not (more := next(lines, "")):
                break
            ahead.append(more)
        following.append(ahead[len(following)])
        is_open ^= following[-1].count('"') % 2
    return following


def _quoted_cells(lines: list[str], width: int) -> list[str] | None:
    """The cells of a row that was written with quotes; None where these lines are no such row."""
    row = _without_end("".join(lines))
    if not _ROW.fullmatch(row):
        return None
    written = [match[1] for match in _CELL.finditer(row)]
    cells = [cell[1:-1].replace('""', '"') if cell[:1] == '"' else cell for cell in written]
    if width and len(cells) != width:
        return None
    if not any(cell[:1] == '"' and _NEEDS_QUOTES.search(text) for cell, text in zip(written, cells, strict=True)):
        return None
    tabs = width - 1 if width else lines[0].count("\t")
    is_row_per_line = len(lines) > 1 and all(line.count("\t") == tabs for line in lines)
    return None if is_row_per_line else cells


def _without_returns(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r").replace("\r", " ") + "\n" * line.endswith("\n")


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
