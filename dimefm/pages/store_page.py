"""Sections about embedding stores of images and of texts."""

from __future__ import annotations

from collections.abc import Sequence

from dimefm.inspection.info import examine
from dimefm.pages.page import Facts, Section


def store_sections(paths: Sequence[str]) -> list[Section]:
    """What is in each store."""
    found = [examine(path) for path in paths]
    return [Section(one.title, [Facts(one.rows)]) for one in found]
