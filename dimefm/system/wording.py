"""Pieces of what is shown to a person: counts with their nouns, rates, and lines that a terminal need not break."""

from __future__ import annotations

import textwrap
from decimal import Decimal

_WIDTH = 80


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2,462 shards`; `plural` is for nouns that do not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def rate(count: float, seconds: float, noun: str, plural: str = "") -> str:
    """How fast something went: `812 images/s`, `3.4 images/s`, or `one image in 12.5 s` where it was slow."""
    per_second = count / max(seconds, 1e-9)
    if per_second >= 1:
        return f"{per_second:,.{0 if per_second >= 100 else 1}f} {plural or f'{noun}s'}/s"
    return f"one {noun} in {1 / per_second:,.1f} s" if per_second else f"no {noun}"


def three_digits(value: float) -> str:
    """A number to three digits at least, never as a power of ten: `0.0195`, `4.05`, `70.2`, `3,922`."""
    return f"{value:,.0f}" if value >= 100 else f"{Decimal(f'{value:.3g}'):f}"


def hanging(head: str, words: str) -> str:
    """`head` and then `words`, broken between words so that no line is longer than 80 characters. Further lines are
    indented to below the first of the words. A word that is longer than a line, such as a path, is not broken."""
    room = max(_WIDTH - len(head), 20)
    lines = textwrap.wrap(words, room, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    return head + f"\n{' ' * len(head)}".join(lines)
