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


def teacher_rows(teacher: dict[str, Any]) -> Rows:
    """The lines about a teacher, of the facts of its identity."""
    pre = teacher["preprocessing"]
    tag = f" ({teacher['pretrained']})" if teacher["pretrained"] else ""
    origin = f"; from {teacher['preprocessing_from']}" if teacher["preprocessing_from"] else ""
    facts = f"{teacher['embed_dim']} wide, {teacher['activation']}, {teacher['precision']}"
    return [
        ("teacher", f"{teacher['name']}{tag}, {facts}"),
        ("weights", f"sha256 {teacher['weights'][:16]}"),
        ("preprocessing", f"{_pixels(pre['size'])}, {pre['resize_mode']}, {pre['interpolation']}{origin}"),
    ]


def _pixels(size: list[int]) -> str:
    return f"{size[0]} x {size[1]} px"
