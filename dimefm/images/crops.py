"""Views: random crops, flips and operations as numbers, which stage 1 draws once and caches, and the trainer replays.

cache_schemas.views says what the numbers are. Shapes: H, W height and width of an image, V views, P numbers of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cache_schemas import Preprocessing, StrongViews, ViewPlan
from cache_schemas.views import BOX, FIXED, JITTER, MIXUP, ONE, Operation
from dimefm.images import operations
from dimefm.images.preprocess import interpolation_mode, resize

_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_APPLIED, _SPREAD = 0.5, 0.5  # how often an operation is applied; the standard deviation of its magnitude
_RANGES = {
    Operation.COLOR: 0.9 * ONE,
    Operation.CONTRAST: 0.9 * ONE,
    Operation.BRIGHTNESS: 0.9 * ONE,
    Operation.SHARPNESS: 0.9 * ONE,
    Operation.SHEAR_X: 0.3 * FIXED,
    Operation.SHEAR_Y: 0.3 * FIXED,
    Operation.TRANSLATE_X: 0.45 * FIXED,
    Operation.TRANSLATE_Y: 0.45 * FIXED,
}
"""How far the level of an operation may be from that which changes nothing, at magnitude 10."""
_MOST_DEGREES, _MOST_ADDED, _MOST_BITS_LOST = 30, 110, 4
_PARTNER_VIEWS = 4  # neighbouring views that are mixed with the same row, which so is decoded once for them
_PILLOW = 13  # whose order of the axes a crop is resized in, whatever is installed: another would give other pixels
_MIXUP_STREAM = 0x313  # beside those of the crops, so that mixup changes no crop


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


def draw_views(plan: ViewPlan, row: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The views of a row, without mixup: int32 (V, P). Each depends on the seed, the row and its own number alone, so
    that views which are added later are those that would have been drawn at once."""
    return np.stack([draw_view(plan, row, view, height, width) for view in range(plan.first, plan.end)])


def draw_view(plan: ViewPlan, row: int, view: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The view with this number of a row whose image has this size, without mixup: int32 (P,)."""
    rng = np.random.default_rng((plan.seed, row, view))
    numbers_P = np.zeros(plan.alone, np.int32)
    numbers_P[:4] = random_crop(height, width, plan.crop_scale, rng)
    numbers_P[4] = plan.flip and rng.random() < 0.5
    if plan.strong:
        numbers_P[BOX:] = draw_operations(plan.strong, rng)
    return numbers_P


def draw_operations(strong: StrongViews, rng: np.random.Generator) -> list[int]:
    """Operations with their levels, then the factors of the jitter; as many draws whatever comes out. For
    `with_operations`."""
    numbers: list[int] = []
    for _ in range(strong.operations):
        applied, operation = rng.random() < _APPLIED, Operation(int(rng.integers(1, len(Operation))))
        share = min(max(rng.normal(strong.magnitude, _SPREAD), 0), 10) / 10
        sign = 1 if rng.random() < 0.5 else -1
        numbers += (operation, level(operation, share, sign)) if applied else (Operation.NONE, 0)
    return numbers + [round(ONE * (1 + rng.uniform(-strong.jitter, strong.jitter))) for _ in range(JITTER)]


def level(operation: Operation, share: float, sign: int) -> int:
    """The level of an operation at a share of its strength, 0 to 1, in one of its two directions where it has any."""
    if operation in (Operation.COLOR, Operation.CONTRAST, Operation.BRIGHTNESS, Operation.SHARPNESS):
        return ONE + sign * round(share * _RANGES[operation])
    if operation in _RANGES:
        return sign * round(share * _RANGES[operation])
    return {
        Operation.ROTATE: sign * round(FIXED * math.sin(math.radians(_MOST_DEGREES * share))),
        Operation.POSTERIZE: 8 - round(_MOST_BITS_LOST * share),
        Operation.SOLARIZE: 256 - round(256 * share),
        Operation.SOLARIZE_ADD: round(_MOST_ADDED * share),
    }.get(operation, 0)


def draw_mixup(plan: ViewPlan, row: int, view: int, start: int, stop: int) -> tuple[int, int]:
    """The row that a view of `row` is mixed with, another one of the shard start..stop-1, and the share of its own
    pixels in 1/256: the larger of the two, so that a view is still one of its row (as in MixMatch, arXiv:1905.02249).
    -1 and all of it where nothing is left to mix."""
    partners = np.random.default_rng((plan.seed, row, view // _PARTNER_VIEWS, _MIXUP_STREAM))
    drawn = np.random.default_rng((plan.seed, row, view, _MIXUP_STREAM + 1)).beta(plan.mixup, plan.mixup)
    share = max(drawn, 1 - drawn)
    if stop - start < 2 or round(ONE * share) == ONE:
        return -1, ONE
    other = start + int(partners.integers(stop - start - 1))
    return other + (other >= row), round(ONE * share)


def replay(
    image_3HW: torch.Tensor,
    numbers_P: np.ndarray[Any, Any],
    plan: ViewPlan,
    size: tuple[int, int],
    facts: Preprocessing,
    other: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """The pixels of a view, uint8 (3, *size): what the teacher saw, and at another size the same view for a student.
    With mixup, `other` is asked for the image of the row that is mixed in."""
    view_3HW = _replay_alone(image_3HW, numbers_P[: plan.alone], size, facts)
    if not plan.mixup or numbers_P[plan.alone] < 0:
        return view_3HW
    row, share = numbers_P[plan.alone : plan.alone + MIXUP].tolist()
    other_3HW = _replay_alone(other(row), numbers_P[plan.alone + MIXUP :], size, facts)
    return torch.from_numpy(operations.mix(view_3HW.numpy(), other_3HW.numpy(), share))


def _replay_alone(
    image_3HW: torch.Tensor, numbers_P: np.ndarray[Any, Any], size: tuple[int, int], facts: Preprocessing
) -> torch.Tensor:
    top, left, height, width, flipped = numbers_P[:BOX].tolist()
    crop = image_3HW[:, top : top + height, left : left + width]
    view = resize(crop, size, interpolation_mode(facts), pillow=_PILLOW)
    view = view.flip(-1) if flipped else view
    return view if len(numbers_P) == BOX else with_operations(view, numbers_P[BOX:].tolist())


def with_operations(view_3HW: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """A view, uint8 (3, H, W), after the operations and the jitter that `draw_operations` has drawn."""
    *chosen, brightness, contrast, color = numbers
    pixels_3HW = np.ascontiguousarray(view_3HW.numpy())
    for operation, degree in zip(chosen[::2], chosen[1::2], strict=True):
        pixels_3HW = operations.apply(pixels_3HW, operation, degree)
    return torch.from_numpy(operations.jitter(pixels_3HW, brightness, contrast, color))
