"""The format of open_clip: the folder that training writes, as it is, or with weights of half the size."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from cache_schemas.run import WEIGHTS_FILE
from dimefm.export.config import ExportConfig
from dimefm.export.formats import Written
from dimefm.models.clip import Clip, load_clip
from dimefm.models.weights_file import write_weights


def write(clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written:
    """See formats.Writer."""
    for file in source.iterdir():
        if file.is_file():  # and no cache of the Hub's
            shutil.copy(file, folder)
    if config.precision == "fp16":
        weights = {name: _halved(value) for name, value in load_file(folder / WEIGHTS_FILE).items()}
        write_weights(folder / WEIGHTS_FILE, weights)
        clip = load_clip(f"local-dir:{folder}", precision="fp32", device="cpu")
    return Written(weights=clip.identity.weights, text_tower=clip.text_digest())


def _halved(value: torch.Tensor) -> torch.Tensor:
    """In float16, unless it is beyond that, as a running variance may be."""
    halved = value.half()
    return halved if value.is_floating_point() and halved.isfinite().all() else value
