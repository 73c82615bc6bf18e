"""Images of any mode as images with eight bits per channel, which can be resized and made RGB without harm.

Values of 16 bits go from black at 0 to white at 65,535. For floats, and for TIFF's integers with 32 bits or a sign, a
file does not say which value is white. Values from 0 to 1 are read as black to white; values from 0 to 255 too, if the
largest is 16 or more, so that one range is not mistaken for the other. All else is refused: a wrong picture would go
unnoticed.

Shapes: H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_INSTEAD = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "LAB": "RGB"}
"""The modes to convert to, for modes that Pillow cannot make RGB (La), resizes by the numbers of the palette (PA), or
needs a library for."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 259, 262, 0  # tags of TIFF, and a value of the last
_LEAST_WHITE = 16  # the least maximum of values from 0 to 255: above floats from 0 to 1 that a filter overshot


def eight_bit(image: Image.Image) -> Image.Image:
    """A loaded image with eight bits per channel; the image itself where it has them. Raises ValueError, with the
    reason, for values whose white is not known."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        if tags and tags.prefix == b"MM" and tags.get(_COMPRESSION, 1) != 1:
            raise ValueError("Pillow misreads such values where they are big-endian and compressed: save it plainly")
        grey_HW = _scaled(np.asarray(image))
    elif image.mode == "I" or image.mode.startswith("I;16"):
        bits = 12 if image.format == "TIFF" and tags.get(_BITS) == (12,) else 16
        grey_HW = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    else:
        if image.mode == "P":
            image.info.pop("transparency", None)  # `convert` would warn of it; RGB has none
        return image.convert(_INSTEAD[image.mode]) if image.mode in _INSTEAD else image
    # In images of eight bits and fewer Pillow has inverted it.
    return Image.fromarray(255 - grey_HW if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey_HW)


def _scaled(values_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats or integers as uint8, by the rule at the top of this file."""
    strange = values_HW.size - int(np.isfinite(values_HW).sum())
    if strange:
        raise ValueError(f"{strange:,} of its {values_HW.size:,} values are NaN or infinite")
    low, high = values_HW.min(), values_HW.max()
    if low < 0 or high > 255 or 1 < high < _LEAST_WHITE:
        what = f"its values go from {low:g} to {high:g}, and nothing says which is white"
        raise ValueError(f"{what}: save it with 8 or 16 bits, or as floats from 0 to 1")
    return (values_HW * 255.0 if high <= 1 else values_HW).round().astype(np.uint8)
