"""The account of what a source does not use: counts by reason, with an example of each, and a list of problems.

A source fills an Account when it is opened and when its samples are listed. The account goes into the store's
attributes, and is printed when the plan is made and by `dimefm info`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache_schemas import Skipped
from dimefm.system.inert_text import line

_MOST_REASONS = 50
_OTHER = "for other reasons"


class Account:
    """Counts of files, members of archives, lines and rows that were skipped, and problems such as damaged files."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """A line for each file that is damaged, or is not what its name says."""
        self._skipped: dict[str, tuple[str, list[int]]] = {}  # by reason: an example, and the count in a list

    def problem(self, text: str) -> None:
        """Note damage, or a likely mistake, in a line that names the file."""
        self.problems.append(text)

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Count something that is not used. `reason` is a noun in the plural, such as `hidden files`, which may be
        followed by how to use them, in parentheses. The first example of each reason is kept."""
        found = self._skipped.get(reason)
        if found is None:
            if len(self._skipped) >= _MOST_REASONS:  # reasons may hold parts of names, and so be many
                reason = _OTHER
            found = self._skipped.setdefault(reason, (line(example), [0]))
        found[1][0] += count  # in place, since this is called twice per image of most tars

    def add(self, other: Account) -> None:
        """Add the counts and problems of another account."""
        self.problems += other.problems
        for one in other.skipped():
            self.skip(one.reason, one.example, one.count)

    def skipped(self) -> tuple[Skipped, ...]:
        """The counts by reason, in the order in which the reasons came up."""
        found = self._skipped.items()
        return tuple(Skipped(reason=reason, count=count, example=example) for reason, (example, (count,)) in found)

    def lines(self) -> list[str]:
        """The counts and the problems, as lines for a person."""
        return [*map(describe_skipped, self.skipped()), *map(line, self.problems)]


def describe_skipped(skipped: Skipped) -> str:
    """For example, `hidden files: 3, such as /data/.DS_Store`."""
    return f"{line(skipped.reason)}: {skipped.count:,}, {'such as ' if skipped.count > 1 else ''}{skipped.example}"


def found_instead(lines: Sequence[str]) -> str:
    """The lines of an account, as the end of an error about finding nothing usable; empty where there are none."""
    return "".join(f"\n  - {text}" for text in first_lines(lines))


def first_lines(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines, then how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most:,} more"] if len(lines) > most else [])]
