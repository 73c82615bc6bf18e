"""Sections for what has no pictures: as `dimefm info` describes it."""

from __future__ import annotations

from collections.abc import Sequence

from dimefm.inspection.info import examine
from dimefm.pages.page import Facts, Section


def described_sections(paths: Sequence[str]) -> list[Section]:
    """A section for each place."""
    found = [examine(path) for path in paths]
    return [Section(one.title, [Facts(one.rows)]) for one in found]
