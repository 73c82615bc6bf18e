"""Images of whatever mode as ones that can be resized and made RGB without harm: eight bits a channel.

Numbers of 16 bits go from black at 0 to white at 65,535. Of floats, and of TIFF's integers with 32 bits or a sign, a
file does not say which is white: from 0 to 1 they are read as black to white, and from 0 to 255 too where the largest
is 16 or more, so that neither is taken for the other. All else is refused; a wrong picture would not be noticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_INSTEAD = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "LAB": "RGB"}
"""Modes that Pillow cannot make RGB (La), or resizes by the numbers of its palette (PA), or needs a library for."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 259, 262, 0  # tags of TIFF, and a value of the last
_LEAST_WHITE = 16  # of what goes to 255: above any float from 0 to 1 that a filter has overshot


def eight_bit(image: Image.Image) -> Image.Image:
    """A loaded image, itself where nothing is in the way. Raises ValueError, with the reason, for numbers that nothing
    says the white of."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        if tags and tags.prefix == b"MM" and tags.get(_COMPRESSION, 1) != 1:
            raise ValueError("it is big-endian and compressed, of which Pillow misreads such numbers: save it plainly")
        grey_HW = _scaled(np.asarray(image))
    elif image.mode == "I" or image.mode.startswith("I;16"):
        bits = 12 if image.format == "TIFF" and tags.get(_BITS) == (12,) else 16
        grey_HW = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    else:
        if image.mode == "P":
            image.info.pop("transparency", None)  # which convert would warn of; RGB has none
        return image.convert(_INSTEAD[image.mode]) if image.mode in _INSTEAD else image
    # Of eight bits and fewer Pillow turns it around itself.
    return Image.fromarray(255 - grey_HW if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey_HW)


def _scaled(values_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8, by the rule above."""
    strange = values_HW.size - int(np.isfinite(values_HW).sum())
    if strange:
        raise ValueError(f"{strange:,} of its {values_HW.size:,} values are NaN or infinite")
    low, high = values_HW.min(), values_HW.max()
    if low < 0 or high > 255 or 1 < high < _LEAST_WHITE:
        what = f"its values go from {low:g} to {high:g}, and nothing says which is white"
        raise ValueError(f"{what}: save it with 8 or 16 bits, or as floats from 0 to 1")
    return (values_HW * 255.0 if high <= 1 else values_HW).round().astype(np.uint8)
