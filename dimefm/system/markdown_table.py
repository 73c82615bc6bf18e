"""Tables for people to read, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], align: str = "", *, padded: bool = False) -> list[str]:
    """The lines of a table whose first row is the head.

    `align` has a letter for each column, `l` or `r`; without it all are `l`. `padded` makes the columns equally wide,
    for a table that is also shown on a terminal. Cells are Markdown: what others wrote (names, keys, classes) must have
    gone through `system.inert_text.markdown`.
    """
    align = align or "l" * len(rows[0])
    rule = ["---:" if letter == "r" else "---" for letter in align]
    if padded:
        widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
        rows = [
            [f"{cell:{'>' if a == 'r' else '<'}{w}}" for cell, a, w in zip(row, align, widths, strict=True)]
            for row in rows
        ]
        rule = [one[-1].rjust(width, "-") for one, width in zip(rule, widths, strict=True)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
