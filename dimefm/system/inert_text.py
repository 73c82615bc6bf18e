"""Make text that others wrote harmless where it is shown: names of files, keys, classes, sentences, reasons.

The name of a file may hold an escape sequence that rewrites the terminal, a line end that forges a line of a report,
HTML, or the beginning of a formula. Stored text is not changed; shown text goes through one of these functions.
"""

from __future__ import annotations

import re
from typing import Any

import click

# Control characters, Unicode's line ends and marks that turn the direction of what follows, halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAK = re.compile("[\t\n]")
_MARKDOWN = str.maketrans({**{c: f"\\{c}" for c in "\\|`[]"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"})
_LATEX = {**{c: f"\\{c}" for c in "&%_#${}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$"}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def text(value: object) -> str:
    """For a terminal: line ends and tabs stay; other control characters are written as Python does, such as \\x1b."""
    return _CONTROL.sub(_escape, str(value))


def line(value: object) -> str:
    """For a place within a line: as `text`, with line ends and tabs written so as well."""
    return _BREAK.sub(_escape, text(value))


def markdown(value: object) -> str:
    """For Markdown, also within a cell of a table: no HTML, link, code or cell begins or ends in it."""
    return line(value).translate(_MARKDOWN)


def csv_cell(value: object) -> str:
    """For a spreadsheet: text that would be taken for a formula gets an apostrophe before it; numbers stay."""
    cell = line(value)
    return f"'{cell}" if cell.startswith(_FORMULA) and not _is_number(cell) else cell


def latex(value: object) -> str:
    """For LaTeX: no command begins in it."""
    return "".join(_LATEX.get(c, c) for c in line(value))


def say(value: object, **options: Any) -> None:
    """click.echo of `text`; every command prints with this."""
    click.echo(text(value), **options)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
