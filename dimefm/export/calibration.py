"""The images on which int8 measures the ranges of a tower: those that a student was trained on, and never the labelled
images on which its loss is measured.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schemas import Preprocessing, SchemaError
from cache_schemas.run import RUN_FILE
from dimefm.errors import DimefmError
from dimefm.export.check_material import images_of_run, spread
from dimefm.export.config import ExportConfig
from dimefm.images.decode import DecodeError
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.sample import sample_dir
from dimefm.sample.archive import read_tars
from dimefm.system.notes import note
from dimefm.system.wording import counted

IMAGES = 128


def calibration_pixels(facts: Preprocessing, config: ExportConfig) -> np.ndarray[Any, Any]:
    """At most 128 images as the graph takes them: (N, 3, H, W), uint8, or float32 and normalised."""
    images, where = _images(config)
    preprocess, found = Preprocess(facts), list[torch.Tensor]()
    for data in images:
        try:
            found.append(preprocess(data))
        except DecodeError:  # the store of a run may hold what has been damaged since
            continue
    note(f"int8: measuring ranges on {counted(len(found), 'image')} of {where} ...")
    pixels_N3HW = torch.stack(found)
    if config.image_input == "float32":
        pixels_N3HW = normalise(pixels_N3HW, facts.mean, facts.std)
    return pixels_N3HW.numpy()


def _images(config: ExportConfig) -> tuple[list[bytes], str]:
    """Encoded images, and whose they are."""
    if Path(config.source, RUN_FILE).exists():
        try:
            return list(images_of_run(config.source, IMAGES)), "the run"
        except (DimefmError, SchemaError, OSError) as error:
            reason = error.what if isinstance(error, DimefmError) else error
            note(f"int8: the images of {config.source} cannot be read now: {reason}")
    samples = [sample["jpg"] for _, sample in read_tars("*.tar", sample_dir() / "images")]
    return [samples[place] for place in spread(len(samples), IMAGES)], "the shipped sample"
