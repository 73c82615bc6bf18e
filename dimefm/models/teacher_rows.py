"""A teacher for people: the lines about it in `info` and in a dry run."""

from __future__ import annotations

from typing import Any


def teacher_rows(teacher: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines about a teacher, each a name and words, of the facts of its identity (a TeacherIdentity as a plain
    document)."""
    pre = teacher["preprocessing"]
    tag = f" ({teacher['pretrained']})" if teacher["pretrained"] else ""
    origin = f"; from {teacher['preprocessing_from']}" if teacher["preprocessing_from"] else ""
    kind = teacher["activation"] if teacher["tokenizer"] else "without a text tower"
    facts = f"{teacher['embed_dim']} wide, {kind}, {teacher['precision']}"
    height, width = pre["size"]
    return [
        ("teacher", f"{teacher['name']}{tag}, {facts}"),
        ("weights", f"sha256 {teacher['weights'][:16]}"),
        ("preprocessing", f"{height} x {width} px, {pre['resize_mode']}, {pre['interpolation']}{origin}"),
    ]
