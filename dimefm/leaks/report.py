"""What `dimefm leaks` says: for each test set, how many of its images are trained on."""

from __future__ import annotations

from cache_schemas.leaks import Leaks
from dimefm.system.inert_text import line, markdown
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import counted


def as_text(found: Leaks, out: str) -> str:
    """A table of the sets, and what to do."""
    head = ("test set", "images", "also trained on", "share", "pairs looked at", "unreadable")
    rows = [
        (
            markdown(one.title),
            f"{one.images:,}",
            f"{one.leaked:,}",
            f"{one.leaked / max(1, one.images):.2%}",
            f"{one.candidates:,}",
            f"{one.unread:,}",
        )
        for one in found.sets
    ]
    table = "\n".join(markdown_table([head, *rows], "lrrrrr", padded=True))
    if not found.rows:
        return f"{table}\n\nno training image stands in these sets\nwritten: {line(out)}"
    what = f"{counted(found.rows, 'training image')} in all: to train without, give train-student --image-selection"
    return f"{table}\n\n{what} {line(out)}\nthe pairs: dimefm report {line(out)}"
