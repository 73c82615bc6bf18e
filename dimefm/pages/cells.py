"""Cells of tables that are sorted by their numbers."""

from __future__ import annotations

from dimefm.pages.page import Cell

Row = list[str | Cell]


def count(value: int, share: float | None = None) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", float(value), share=share)


def percent(share: float) -> Cell:
    """A share, with its bar."""
    return Cell(f"{share:.1%}", share, share=min(1.0, share))


def measure(value: float | None, words: str) -> Cell:
    """A number in words of its own; empty, and first when sorted, where there is none."""
    return Cell("", -1.0) if value is None else Cell(words, value)
