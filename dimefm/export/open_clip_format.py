"""The format of open_clip: the folder that training writes, as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from dimefm.export.config import ExportConfig
from dimefm.export.formats import Written
from dimefm.models.clip import Clip


def write(clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written:
    """See formats.Writer."""
    for file in source.iterdir():
        shutil.copy(file, folder)
    return Written(weights=clip.identity.weights, text_tower=clip.text_digest())
