"""From encoded image bytes to pixels, or to the status and reason why not.

JPEG goes through torchvision (libjpeg-turbo, no intermediate copies); everything else, and JPEG in CMYK, through
Pillow. Both give the same pixels for the same JPEG.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
import re
import warnings

import torch
from PIL import Image
from simplejpeg import decode_jpeg as decode_jpeg_scaled
from simplejpeg import decode_jpeg_header

from cache_schemas import Status

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29: without it Pillow decodes, to the same pixels
    decode_jpeg = None

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: Pillow's own threshold for a decompression bomb (a 256 MiB RGB image)."""

_ADDRESS = re.compile(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>")  # another in every run
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I")


class DecodeError(Exception):
    """An image that cannot be decoded; becomes the row's status and reason."""

    def __init__(self, status: Status, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with only its header read, and its size checked before any pixel is allocated.

    Raises DecodeError for no bytes, for what is not an image, and above `max_pixels`.
    """
    if not data:
        raise DecodeError(Status.EMPTY, "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DecodeError(Status.TOO_LARGE, str(error)) from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DecodeError(Status.UNDECODABLE, _reason(error)) from None
    width, height = image.size
    if width * height > max_pixels:
        reason = f"{width} x {height} is {width * height:,} pixels; the limit is {max_pixels:,}"
        raise DecodeError(Status.TOO_LARGE, reason)
    return image


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> torch.Tensor | Image.Image:
    """Pixels of an encoded image: a uint8 RGB tensor (3, H, W) for JPEG, else a loaded Pillow image in its own mode.

    The first frame of an animation; EXIF orientation is left alone, as open_clip does. Raises DecodeError.
    """
    image = open_image(data, max_pixels)
    try:
        if decode_jpeg is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)  # type: ignore[no-any-return]
    except Exception as error:  # as in open_image
        raise DecodeError(Status.UNDECODABLE, _reason(error)) from None
    return _loaded(image)


def decode_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A loaded Pillow image in its own mode, whatever the format: what open_clip's own steps begin with. Raises
    DecodeError."""
    return _loaded(open_image(data, max_pixels))


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Pixels as a uint8 RGB tensor (3, H, W), whatever the format. Raises DecodeError."""
    image = decode(data, max_pixels)
    if isinstance(image, torch.Tensor):
        return image
    return to_tensor(image)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG in grey or colour, from its header; None for anything else, and above MAX_PIXELS."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if space in ("Gray", "YCbCr", "RGB") and height * width <= MAX_PIXELS else None


def decode_scaled(data: bytes, whole: tuple[int, int], scale: float) -> torch.Tensor:
    """A JPEG of that height and width as a uint8 RGB tensor (3, H, W), decoded at the smallest n/8 of its size that is
    `scale` of it or more: the rest of the inverse transform is not computed. At 1 as `decode_rgb`, which is asked where
    the strict decoder finds fault. Raises DecodeError.
    """
    height, width = (math.ceil(side * scale) for side in whole)
    try:
        pixels_HW3 = decode_jpeg_scaled(data, min_height=height, min_width=width)
    except ValueError:
        return decode_rgb(data)
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A Pillow image as a uint8 RGB tensor (3, H, W)."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def _loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as in open_image
        raise DecodeError(Status.UNDECODABLE, _reason(error)) from None
    return _to_eight_bit(image) if image.mode in _SIXTEEN_BIT else image


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey by its high byte: Pillow's own conversion clips at 255, which turns most of an image white."""
    if image.mode == "I":
        return image.point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _reason(error: Exception) -> str:
    first_line = _ADDRESS.sub("", str(error).strip().split("\n")[0])
    return first_line[first_line.find("cpp:") + 4 :].lstrip("0123456789, ") if ".cpp:" in first_line else first_line
