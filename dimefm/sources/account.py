"""What lies in a place that the user named and is not used: counted by reason, with an example of each.

A source is given an Account when it is opened and when it is listed. What it holds goes into the plan, and is printed
when the plan is made and by `dimefm info`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache_schemas import Skipped
from dimefm.system.inert_text import line

_MOST_REASONS = 50
_OTHER = "for other reasons"


class Account:
    """Files, members of archives, lines and rows that were skipped, and files that are damaged."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """A line for each file that could not be read through, or not as it claims to be."""
        self._skipped: dict[str, tuple[str, list[int]]] = {}  # by reason, an example and how many

    def problem(self, text: str) -> None:
        """Note damage, or what is likely a mistake, in a line that names the file."""
        self.problems.append(text)

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Count something that is not used. `reason` is a noun in the plural, such as `hidden files`; what follows it
        in parentheses says how to use them. Of its examples the first is kept."""
        found = self._skipped.get(reason)
        if found is None:
            if len(self._skipped) >= _MOST_REASONS:  # a reason may hold part of a name
                reason = _OTHER
            found = self._skipped.setdefault(reason, (line(example), [0]))
        found[1][0] += count  # of which there are two for each image in a tar

    def add(self, other: Account) -> None:
        """Add what another account holds."""
        self.problems += other.problems
        for one in other.skipped():
            self.skip(one.reason, one.example, one.count)

    def skipped(self) -> tuple[Skipped, ...]:
        """What was skipped, by reason, in the order in which the reasons came up."""
        known = self._skipped.items()
        return tuple(Skipped(reason=reason, count=count, example=one) for reason, (one, (count,)) in known)

    def lines(self) -> list[str]:
        """Both kinds as lines for a person."""
        return [*map(describe_skipped, self.skipped()), *map(line, self.problems)]


def describe_skipped(skipped: Skipped) -> str:
    """`hidden files: 3, such as /data/.DS_Store`."""
    return f"{line(skipped.reason)}: {skipped.count:,}, {'such as ' if skipped.count > 1 else ''}{skipped.example}"


def found_instead(lines: Sequence[str]) -> str:
    """Lines of an account as the end of an error; nothing where there are none."""
    return "".join(f"\n  - {text}" for text in first_lines(lines))


def first_lines(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most:,} more"] if len(lines) > most else [])]
