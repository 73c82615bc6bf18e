"""open_clip's own evaluation steps on a Pillow image, up to normalisation, with Pillow and NumPy alone: so a model that
runs without torch sees the same pixels. tests/images compares each with open_clip's.

Shapes: H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cache_schemas import Preprocessing, Status
from dimefm.images.decode import MAX_PIXELS, DecodeError, decode_pillow


def input_pixels(data: bytes, facts: Preprocessing) -> np.ndarray[Any, Any]:
    """Encoded bytes to a model's input, uint8 (3, H, W), as Preprocess with `exact` gives it. Raises DecodeError."""
    image = decode_pillow(data)
    require_drawable(image.height, image.width, facts)
    return np.ascontiguousarray(np.asarray(resize_and_crop(image, facts).convert("RGB")).transpose(2, 0, 1))


def require_drawable(height: int, width: int, facts: Preprocessing) -> None:
    """Raises DecodeError for a strip: one of a pixel by thousands becomes, with its short side enlarged, larger than
    any memory."""
    enlarged = max(facts.size) ** 2 * max(height, width) // min(height, width)
    if facts.resize_mode == "shortest" and enlarged > MAX_PIXELS:
        reason = f"{width} x {height} would be {enlarged:,} pixels when resized; the limit is {MAX_PIXELS:,}"
        raise DecodeError(Status.TOO_LARGE, reason)


def resize_and_crop(image: Image.Image, facts: Preprocessing) -> Image.Image:
    """The image in the size of a model's input, in its own mode. Raises DecodeError for a strip that vanishes."""
    height, width = facts.size
    by = Image.Resampling.BILINEAR if facts.interpolation == "bilinear" else Image.Resampling.BICUBIC
    if facts.resize_mode == "squash":
        return _resize(image, (height, width), by)
    ratios = image.height / height, image.width / width
    if facts.resize_mode == "longest":
        resized = _resize(image, _divided(image, max(ratios)), by)
        return _crop(_pad(resized, height, width, facts.fill_color), height, width)
    if height == width:
        return _crop(_resize(image, shorter_side(image.height, image.width, height), by), height, width)
    # Of an input that is not square open_clip does not look at the interpolation
    resized = _resize(image, _divided(image, min(ratios)), Image.Resampling.BICUBIC)
    return _crop(_pad(resized, height, width, 0), height, width)


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width with the shorter side `side` pixels long, and the longer rounded down, as torchvision's
    Resize."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def _divided(image: Image.Image, ratio: float) -> tuple[int, int]:
    size = round(image.height / ratio), round(image.width / ratio)
    if 0 in size:
        raise DecodeError(Status.UNDECODABLE, f"of {image.width} x {image.height} nothing would be left when resized")
    return size


def _resize(image: Image.Image, size: tuple[int, int], by: Image.Resampling) -> Image.Image:
    height, width = size
    return image.resize((width, height), by)


def _pad(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    """As torchvision's: of an odd number of missing pixels, the right and the lower side get one more."""
    across, down = max(0, width - image.width), max(0, height - image.height)
    if not across and not down:
        return image
    bands = len(image.getbands())
    border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
    padded = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle, as torchvision's CenterCrop has it."""
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
