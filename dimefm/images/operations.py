"""The operations of strong views, version 1: what each does to the pixels, to the last bit.

They are ours, and not those of a library, because the teacher's embedding of a view is kept for years and the view is
made again whenever a student is trained: no release of anything may change it. So all is done in integers, with tables
of 256 entries, and no result depends on the processor or the number of threads. `tests/images/test_operations.py` holds
a digest of every operation; a definition that gives other pixels is another version (cache_schemas.views).

The set is that of timm's RandAugment (Apache-2.0) with the "increasing" strengths, and each operation agrees with what
Pillow does to within rounding. They are applied to the view at the size of the model that sees it. Shifts are shares of
the side, so that teacher and student see the same view at their own sizes; what goes by the pixels of the view (the
histograms, and the neighbours of sharpness) is of that size.

Shapes: H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cache_schemas.views import FIXED, ONE, Operation

Pixels = np.ndarray[Any, Any]
"""uint8 (3, H, W)."""

_RED, _GREEN, _BLUE = 19595, 38470, 7471  # of 65536: the weights of grey, Pillow's and ITU-R BT.601's
_FILL = 128  # what is seen beyond the edge
_WEIGHT_BITS = 8  # of the weights of neighbouring pixels
_VALUES = np.arange(256, dtype=np.int32)


def apply(image_3HW: Pixels, operation: int, level: int) -> Pixels:
    """The image after one operation at this level (cache_schemas.views.Operation says what levels are)."""
    return _OPERATIONS[Operation(operation)](image_3HW, level)


def jitter(image_3HW: Pixels, brightness: int, contrast: int, color: int) -> Pixels:
    """The image after changes of brightness, contrast and colour by these factors, in 1/256, in this order."""
    brighter_3HW = _brightness(image_3HW, brightness)
    return _color(_contrast(brighter_3HW, contrast), color)


def mix(image_3HW: Pixels, other_3HW: Pixels, share: int) -> Pixels:
    """`share` 256ths of one image and the rest of the other, rounded."""
    mixed_3HW = image_3HW.astype(np.uint16) * np.uint16(share)
    mixed_3HW += other_3HW.astype(np.uint16) * np.uint16(ONE - share)  # at most 255 * 256
    mixed_3HW += np.uint16(ONE // 2)
    return (mixed_3HW >> 8).astype(np.uint8)


# -- by value ---------------------------------------------------------------------------------------------------------


def _table(image_3HW: Pixels, values: np.ndarray[Any, Any]) -> Pixels:
    """Each pixel replaced by its entry of a table (256,), clipped to 0..255."""
    found: Pixels = np.take(values.clip(0, 255).astype(np.uint8), image_3HW)
    return found


def _nothing(image_3HW: Pixels, level: int) -> Pixels:
    return image_3HW


def _invert(image_3HW: Pixels, level: int) -> Pixels:
    return 255 - image_3HW


def _posterize(image_3HW: Pixels, level: int) -> Pixels:
    return image_3HW & np.uint8(256 - (1 << (8 - level)))


def _solarize(image_3HW: Pixels, level: int) -> Pixels:
    return _table(image_3HW, np.where(level > _VALUES, _VALUES, 255 - _VALUES))


def _solarize_add(image_3HW: Pixels, level: int) -> Pixels:
    return _table(image_3HW, np.where(_VALUES < 128, _VALUES + level, _VALUES))


def _brightness(image_3HW: Pixels, level: int) -> Pixels:
    return _table(image_3HW, _blend(0, _VALUES, level))


def _contrast(image_3HW: Pixels, level: int) -> Pixels:
    """Towards or away from the mean of the grey image, which is rounded."""
    red, green, blue = (int(channel_HW.sum(dtype=np.int64)) for channel_HW in image_3HW)
    whole = FIXED * image_3HW[0].size
    mean = (_RED * red + _GREEN * green + _BLUE * blue + whole // 2) // whole
    return _table(image_3HW, _blend(mean, _VALUES, level))


def _blend(base: Any, values: np.ndarray[Any, Any], level: int) -> np.ndarray[Any, Any]:
    """The point between `base` (0) and `values` (256), or beyond them, rounded half up, int32."""
    found: np.ndarray[Any, Any] = (base * (ONE - level) + values * level + ONE // 2) >> 8
    return found


# -- by histogram -----------------------------------------------------------------------------------------------------


def _autocontrast(image_3HW: Pixels, level: int) -> Pixels:
    """The values of each channel stretched to 0..255, rounded down; a channel of one value stays."""
    return np.stack([_stretched(channel_HW) for channel_HW in image_3HW])


def _stretched(channel_HW: Pixels) -> Pixels:
    low, high = int(channel_HW.min()), int(channel_HW.max())
    return _table(channel_HW, (_VALUES - low) * 255 // (high - low)) if high > low else channel_HW


def _equalize(image_3HW: Pixels, level: int) -> Pixels:
    """The values of each channel spread so that each range of them has about as many pixels, as Pillow does."""
    return np.stack([_equalized(channel_HW) for channel_HW in image_3HW])


def _equalized(channel_HW: Pixels) -> Pixels:
    counts = np.bincount(channel_HW.reshape(-1), minlength=256).astype(np.int64)
    step = int(counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    return _table(channel_HW, (step // 2 + np.cumsum(counts) - counts) // step) if step else channel_HW


# -- by neighbours ----------------------------------------------------------------------------------------------------


def _color(image_3HW: Pixels, level: int) -> Pixels:
    """Towards or away from the grey image."""
    red_HW, green_HW, blue_HW = image_3HW.astype(np.int32)
    grey_HW = (_RED * red_HW + _GREEN * green_HW + _BLUE * blue_HW + FIXED // 2) >> 16
    return _blend(grey_HW, image_3HW.astype(np.int32), level).clip(0, 255).astype(np.uint8)


def _sharpness(image_3HW: Pixels, level: int) -> Pixels:
    """Towards or away from the image smoothed by 1 1 1, 1 5 1, 1 1 1 (13ths, rounded); the edge is not smoothed."""
    if min(image_3HW.shape[1:]) < 3:
        return image_3HW
    wide = image_3HW.astype(np.int32)
    across = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    inner = wide[:, 1:-1, 1:-1]
    smooth = (across[:, :-2] + across[:, 1:-1] + across[:, 2:] + 4 * inner + 6) // 13
    sharp_3HW = image_3HW.copy()
    sharp_3HW[:, 1:-1, 1:-1] = _blend(smooth, inner, level).clip(0, 255)
    return sharp_3HW


# -- by place ---------------------------------------------------------------------------------------------------------


def _rotate(image_3HW: Pixels, level: int) -> Pixels:
    """By the angle whose sine is `level` 65536ths; the cosine follows in integers."""
    cosine = math.isqrt(FIXED * FIXED - level * level)
    return _warp(image_3HW, (cosine, -level), (level, cosine))


def _shear_x(image_3HW: Pixels, level: int) -> Pixels:
    return _warp(image_3HW, (FIXED, level), (0, FIXED))


def _shear_y(image_3HW: Pixels, level: int) -> Pixels:
    return _warp(image_3HW, (FIXED, 0), (level, FIXED))


def _warp(image_3HW: Pixels, to_x: tuple[int, int], to_y: tuple[int, int]) -> Pixels:
    """The image at x' = a x + b y, y' = c x + d y around its centre, between pixels by weights of their distance in
    1/256; `to_x` is (a, b) and `to_y` (c, d), in 1/65536. Beyond the edge all is grey."""
    height, width = image_3HW.shape[1:]
    x_W = 2 * np.arange(width, dtype=np.int64) - (width - 1)  # in half pixels from the centre
    y_H1 = 2 * np.arange(height, dtype=np.int64)[:, None] - (height - 1)
    bits, half = 16 + 1 - _WEIGHT_BITS, 1 << (16 - _WEIGHT_BITS)
    centre_x, centre_y = ((side - 1) << (_WEIGHT_BITS - 1) for side in (width, height))
    # In 1/256 of a pixel, from the corner of an image with an edge of one grey pixel around it
    left_HW = ((to_x[0] * x_W + to_x[1] * y_H1 + half) >> bits) + centre_x + ONE
    top_HW = ((to_y[0] * x_W + to_y[1] * y_H1 + half) >> bits) + centre_y + ONE
    left_HW = left_HW.clip(0, (width + 1) * ONE - 1).astype(np.int32)
    top_HW = top_HW.clip(0, (height + 1) * ONE - 1).astype(np.int32)
    padded = np.full((3, height + 2, width + 2), _FILL, np.uint8)
    padded[:, 1:-1, 1:-1] = image_3HW
    place_HW = (top_HW >> 8) * (width + 2) + (left_HW >> 8)
    right_HW, down_HW = (left_HW & (ONE - 1)).astype(np.uint32), (top_HW & (ONE - 1)).astype(np.uint32)
    flat = padded.reshape(3, -1)

    def across(place_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        left, right = (np.take(flat, place_HW + step, axis=1) for step in (0, 1))
        between: np.ndarray[Any, Any] = left * (ONE - right_HW) + right * right_HW
        return between

    upper, lower = across(place_HW), across(place_HW + width + 2)
    warped: Pixels = ((upper * (ONE - down_HW) + lower * down_HW + FIXED // 2) >> 16).astype(np.uint8)
    return warped


def _translate_x(image_3HW: Pixels, level: int) -> Pixels:
    """To the right, or to the left where `level` is below 0, by whole pixels."""
    width = image_3HW.shape[2]
    shift = (level * width + FIXED // 2) >> 16
    moved_3HW = np.full_like(image_3HW, _FILL)
    if abs(shift) < width:
        start, stop = max(0, shift), min(width, width + shift)
        moved_3HW[:, :, start:stop] = image_3HW[:, :, start - shift : stop - shift]
    return moved_3HW


def _translate_y(image_3HW: Pixels, level: int) -> Pixels:
    """Down, or up where `level` is below 0."""
    return _translate_x(image_3HW.swapaxes(1, 2), level).swapaxes(1, 2)


_OPERATIONS: dict[Operation, Callable[[Pixels, int], Pixels]] = {
    Operation.NONE: _nothing,
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
    Operation.INVERT: _invert,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.COLOR: _color,
    Operation.CONTRAST: _contrast,
    Operation.BRIGHTNESS: _brightness,
    Operation.SHARPNESS: _sharpness,
    Operation.ROTATE: _rotate,
    Operation.SHEAR_X: _shear_x,
    Operation.SHEAR_Y: _shear_y,
    Operation.TRANSLATE_X: _translate_x,
    Operation.TRANSLATE_Y: _translate_y,
}
