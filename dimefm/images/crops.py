"""Views: random crops and flips as numbers, which stage 1 draws once and caches, and the trainer replays.

Shapes: H, W height and width of an image, V views.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cache_schemas import Preprocessing, ViewPlan
from dimefm.images.preprocess import interpolation_mode, resize

_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10


def random_crop(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, by the rule of torchvision's RandomResizedCrop: an area whose share
    is drawn from `scale`, a log-uniform aspect ratio from 3/4 to 4/3, and after ten misses the largest central crop."""
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_boxes(plan: ViewPlan, row: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The views of a row, int32 (V, 5): top, left, height and width in pixels, and 1 if flipped, else 0."""
    boxes_V5 = np.zeros((plan.count, 5), np.int32)
    for view in range(plan.count):
        rng = np.random.default_rng((plan.seed, row, view))
        boxes_V5[view, :4] = random_crop(height, width, plan.crop_scale, rng)
        boxes_V5[view, 4] = plan.flip and rng.random() < 0.5
    return boxes_V5


def replay(
    image_3HW: torch.Tensor, box: np.ndarray[Any, Any], size: tuple[int, int], facts: Preprocessing
) -> torch.Tensor:
    """The pixels of a view, uint8 (3, *size): what the teacher saw, and what the student sees at that size."""
    top, left, height, width, flipped = box.tolist()
    view = resize(image_3HW[:, top : top + height, left : left + width], size, interpolation_mode(facts))
    return view.flip(-1) if flipped else view
