"""Tables for people to read, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], align: str = "", *, padded: bool = False) -> list[str]:
    """The lines of a table whose first row is the head.

    `align` has a letter for each column, `l` or `r`; without it all are `l`. `padded` makes the columns equally wide,
    for a table that is also shown on a terminal. Cells are Markdown: what others wrote (names, keys, classes) must have
    gone through `system.inert_text.markdown`.
    """
    rule = ["---:" if letter == "r" else "---" for letter in align or "l" * len(rows[0])]
    if padded:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        rule = ["-" * width for width in widths]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
