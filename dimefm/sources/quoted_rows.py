"""Rows of tables whose cells may be in quotes: CSV, and TSV, which some programs write with quotes and some without."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KB
_MOST_LINES = 1000  # of a row of a TSV
_QUOTED = r'"(?:[^"]|"")*"'
_CELL = re.compile(rf'(?:^|\t)({_QUOTED}|[^"\t\n]*)')
_ROW = re.compile(rf'(?:{_QUOTED}|[^"\t\n]*)(?:\t(?:{_QUOTED}|[^"\t\n]*))*')
_NEEDS_QUOTES = re.compile(r'["\t\r\n]')

Row = tuple[int, int, list[str]]
"""The number of its first line, counted from 1, how many lines it has, and its cells; none where it is blank."""


def csv_rows(lines: Iterator[str], delimiter: str = ",") -> Iterator[Row]:
    """Rows of a CSV, in which quotes may hold anything. A carriage return that ends no line is white space. Raises
    csv.Error, for a quote that is open at the end, too."""
    csv.field_size_limit(_LONGEST_FIELD)
    ended = False

    def plain() -> Iterator[str]:
        nonlocal ended
        yield from (_without_returns(line) if "\r" in line else line for line in lines)
        ended = True

    reader = csv.reader(plain(), delimiter=delimiter)
    number = 1
    for row in reader:
        if ended:  # the reader gives a row with its last line, unless that is within quotes
            raise csv.Error(f"a quote that is opened in line {number}, or after it, is never closed")
        yield number, reader.line_num + 1 - number, row
        number = reader.line_num + 1


def delimiter_of(header: str, wanted: Sequence[str]) -> str:
    """What stands between the names of columns in the first line of a CSV: a comma, unless there is none of `wanted`
    between commas, and there is between semicolons, bars or tabs; or else what makes the most columns."""
    names = {
        mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])]
        for mark in (",", ";", "|", "\t")
    }
    known = (mark for mark, columns in names.items() if any(name in wanted for name in columns))
    return next(known, None) or max(names, key=lambda mark: len(names[mark]))


def tsv_rows(lines: Iterator[str], *, header: bool) -> Iterator[Row]:
    """Rows of a TSV. Quotes are text, but for a row as pandas, Excel and the csv module write it where cells hold tabs,
    quotes or line ends.

    Such a row has all its quotes around whole cells, those within doubled, and at least one of these cells needs them;
    it has as many cells as the first; and if it has several lines, these would not all be rows of that many cells
    without quotes. Where each name of a `header` is in quotes, the file is read as a CSV with tabs.
    """
    first = next(lines, "")
    names = _end_removed(first).split("\t")
    if header and all(len(name) > 1 and name[0] == name[-1] == '"' for name in names):
        yield from csv_rows(chain([first], lines), "\t")
        return
    waiting = deque([first] if first else [])  # lines that were read ahead
    number, width = 1, 0
    while line := waiting.popleft() if waiting else next(lines, ""):
        cells, taken = None, 1
        if '"' in line and (line[0] == '"' or '\t"' in line):
            following = _following(line, waiting, lines)
            if cells := _quoted([line, *following], width):
                taken += len(following)
                for _ in following:
                    waiting.popleft()
        if cells is None:
            text = line[:-1] if line[-1] == "\n" else line
            cells = text.removesuffix("\r").split("\t")
        yield number, taken, cells
        width, number = width or (len(cells) if any(cells) else 0), number + taken


def _following(line: str, waiting: deque[str], lines: Iterator[str]) -> list[str]:
    """The lines over which a row goes on if its quotes are those of cells: until as many are closed as opened. They are
    put into `waiting`."""
    open_, following = line.count('"') % 2, list[str]()
    while open_ and len(following) < _MOST_LINES:
        if len(following) == len(waiting):
            if not (more := next(lines, "")):
                break
            waiting.append(more)
        following.append(waiting[len(following)])
        open_ ^= following[-1].count('"') % 2
    return following


def _quoted(lines: list[str], width: int) -> list[str] | None:
    """The cells of a row with quotes; None where it is not such a row."""
    text = _end_removed("".join(lines))
    if not _ROW.fullmatch(text):
        return None
    cells = [cell[1] for cell in _CELL.finditer(text)]
    inner = [cell[1:-1].replace('""', '"') if cell[:1] == '"' else cell for cell in cells]
    needed = any(cell[:1] == '"' and _NEEDS_QUOTES.search(text) for cell, text in zip(cells, inner, strict=True))
    expected = width or 1 + lines[0].count("\t")
    rows_by_themselves = len(lines) > 1 and all(line.count("\t") == expected - 1 for line in lines)
    return inner if needed and not rows_by_themselves and (not width or len(inner) == width) else None


def _without_returns(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r").replace("\r", " ") + "\n" * line.endswith("\n")


def _end_removed(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
