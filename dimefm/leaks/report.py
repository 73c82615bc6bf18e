"""What `dimefm leaks` says: for each test set, how much of it is trained on."""

from __future__ import annotations

from cache_schemas.leaks import Leaks
from dimefm.store.leaked_rows import unreadable_images
from dimefm.system.inert_text import line, markdown
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import counted


def as_text(found: Leaks, out: str) -> str:
    """A table of the sets, and what to do."""
    images = found.kind == "image"
    head = ["test set", "images" if images else "captions", "also trained on", "share", "pairs looked at"]
    head += ["pairs unreadable"] if images else []
    rows = [
        [
            markdown(one.title),
            f"{one.tested:,}",
            f"{one.leaked:,}",
            f"{one.leaked / max(1, one.tested):.2%}",
            f"{one.candidates:,}",
            *([f"{one.unread:,}"] if images else []),
        ]
        for one in found.sets
    ]
    table = "\n".join(markdown_table([head, *rows], "lrrrrr"[: len(head)], padded=True))
    lost = sum(one.unread for one in found.sets)
    if lost:
        table += f"\n\n{counted(lost, 'pair')} could not be compared, as an image cannot be read: there may be more"
    lines = "".join(f"\n{line(text)}" for text in unreadable_images(found))
    table += f"\n{lines}" if lines else ""
    rows_of_store = "training image" if images else "training sentence"
    if not found.rows:
        return f"{table}\n\nno {rows_of_store} stands in these sets\nwritten: {line(out)}"
    option = "train-student --image-selection" if images else "select-texts --without"
    what = f"{counted(found.rows, rows_of_store)} in all: to train without, give {option}"
    return f"{table}\n\n{what} {line(out)}\nthe pairs: dimefm report {line(out)}"
