"""Images as small JPEGs, so that the trainer does not need the originals."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from cache_schemas import Status
from dimefm.images.decode import DecodeError
from dimefm.images.preprocess import resize, shortest_side

_QUALITY = 90
_LONGEST = 65_500  # pixels of a side that libjpeg can write


def small_jpeg(data: bytes, image: torch.Tensor | Image.Image, side: int) -> bytes:
    """`image`, decoded from `data`, as a JPEG whose shorter side has at most `side` pixels.

    Nothing is enlarged, and a JPEG that is small enough is returned as it is: nothing is lost to a second compression.
    Raises DecodeError where the longer side has more pixels than a JPEG can have.
    """
    if isinstance(image, torch.Tensor):
        if min(image.shape[-2:]) <= side:
            return data
        small: Any = to_pil_image(resize(image, shortest_side(image, side)))
    elif min(image.size) > side:
        scale = side / min(image.size)
        size = (max(side, int(image.width * scale)), max(side, int(image.height * scale)))
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    else:
        small = image.convert("RGB")
    if max(small.size) > _LONGEST:
        what = f"{small.width} x {small.height} is more than the {_LONGEST:,} pixels that a side of a JPEG can have"
        raise DecodeError(Status.TOO_LARGE, what)
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()
