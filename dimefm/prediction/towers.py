"""The two towers of a model on NumPy arrays. Those of an ONNX export need no torch.

Shapes: B images or sentences, D embedding width, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schemas.identity import TeacherIdentity
from dimefm.models.exported import format_of, require_as_exported
from dimefm.models.names import FOLDER
from dimefm.prediction.config import PredictConfig
from dimefm.system.notes import note

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Towers:
    """uint8 (B, 3, H, W), resized and cropped but not normalised, and sentences, to unit-norm float32 (B, D)."""

    identity: TeacherIdentity
    encode_images: Callable[[_Array], _Array]
    encode_texts: Callable[[list[str]], _Array]


@contextmanager
def open_towers(config: PredictConfig) -> Iterator[Towers]:
    """Load the model. Raises a DimefmError if it cannot be loaded."""
    folder = config.model.removeprefix(FOLDER)
    if format_of(folder) == "onnx":
        yield _onnx_towers(folder, config)
        return
    note(f"{config.model}: loading the model ...")
    import torch

    from dimefm.evaluation.open_model import open_model

    with open_model(
        config.model,
        config.pretrained,
        trained=config.trained,
        checkpoint=config.checkpoint,
        weights=config.weights,
        device=config.device,
    ) as clip:
        yield Towers(
            clip.identity,
            lambda pixels_B3HW: clip.encode_images(torch.from_numpy(pixels_B3HW)).cpu().numpy(),
            lambda texts: clip.encode_texts(texts).cpu().numpy(),
        )


def _onnx_towers(folder: str, config: PredictConfig) -> Towers:
    from dimefm.models.onnx_towers import OnnxTowers

    require_as_exported(folder, "onnx", device=config.device, trained=config.trained)
    towers = OnnxTowers(folder)
    return Towers(towers.export.model, towers.encode_images, towers.encode_texts)
