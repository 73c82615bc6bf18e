"""Each format is known wherever a table says something of all of them."""

from __future__ import annotations

from typing import get_args

from cache_schemas.export import ExportFormat
from dimefm.export import card_metadata, card_usage, describe_export
from dimefm.export.formats import FORMATS
from dimefm.inspection import describe_export as info
from dimefm.models.exported import NEEDS


def test_every_table_has_every_format() -> None:
    tables = {
        "FORMATS": FORMATS,
        "models.exported.NEEDS": NEEDS,
        "card_metadata._LIBRARIES": card_metadata._LIBRARIES,
        "card_usage._INSTALL": card_usage._INSTALL,
        "card_usage._ELSEWHERE": card_usage._ELSEWHERE,
        "describe_export._WEIGHTS": describe_export._WEIGHTS,
        "inspection.describe_export._LOADS": info._LOADS,
    }
    lacking = [(name, one) for name, table in tables.items() for one in get_args(ExportFormat) if one not in table]
    assert lacking == []
