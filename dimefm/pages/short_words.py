"""Names and texts at the length for which a heading, a legend or a cell has room."""

from __future__ import annotations

from collections.abc import Sequence

_MOST = 200


def short(text: str, most: int = _MOST) -> str:
    """A text on one line, of at most `most` letters; one that was cut ends in an ellipsis."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def short_names(paths: Sequence[str]) -> list[str]:
    """For each path its last part, and where others end in the same, as many parts as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    return [short("/".join(own[-_needed(own, parts) :]), 60) for own in parts]


def _needed(own: list[str], all_parts: list[list[str]]) -> int:
    others = [parts for parts in all_parts if parts != own]
    return next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
