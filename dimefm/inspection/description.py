"""What `info` shows of a place: facts with names, and the lines that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dimefm.system.inert_text import line
from dimefm.system.wording import hanging

Rows = list[tuple[str, str]]
"""The lines of a description: a name of one word or two, and what there is to say."""


@dataclass(frozen=True)
class Description:
    """What is at a place. `facts` are for programs (docs/formats.md lists their names); `rows` are made of them."""

    title: str
    facts: dict[str, Any]
    rows: Rows

    def show(self) -> str:
        """The lines for a person."""
        width = max(len(name) for name, _ in self.rows)
        lines = [hanging(f"  {line(name):<{width}}  ", line(words)) for name, words in self.rows]
        return "\n".join([line(self.title), *lines])
