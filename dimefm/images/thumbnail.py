"""Pictures small enough to stand on a page by the hundred."""

from __future__ import annotations

import io

from PIL import Image

from cache_schemas import Status
from dimefm.images.decode import DecodeError, open_image
from dimefm.images.image_modes import eight_bit

_QUALITY = 75


def thumbnail(data: bytes, side: int) -> bytes:
    """An encoded image as a JPEG whose longer side has at most `side` pixels. Raises DecodeError."""
    image = open_image(data)
    image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    try:
        small = eight_bit(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders of many formats, which fail in many ways
        raise DecodeError(Status.UNDECODABLE, str(error).strip().split("\n")[0]) from None
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=_QUALITY, optimize=True)
    return sink.getvalue()
