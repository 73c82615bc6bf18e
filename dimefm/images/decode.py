"""From encoded image bytes to pixels, or to the status and reason why not.

simplejpeg (libjpeg-turbo, without intermediate copies) decodes JPEGs. Pillow decodes everything else, JPEGs in CMYK,
and JPEGs in which simplejpeg finds a fault. Both give the same pixels for the same JPEG.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError, features
from simplejpeg import decode_jpeg, decode_jpeg_header

from cache_schemas import Status
from dimefm.images.image_modes import eight_bit
from dimefm.system.first_bytes import describe

if TYPE_CHECKING:  # sources use `sniff` and DecodeError, and must open before torch is imported
    import torch

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: Pillow's own threshold for a decompression bomb (a 256 MiB RGB image)."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "TGA", "ICO",
           "PCX", "SGI", "QOI")  # fmt: skip
"""What Pillow may decode, whatever a file is called; HEIF needs pillow-heif. Pillow's other formats are refused: EPS
would start Ghostscript, IPTC would open any format within it, and WMF would ask the operating system."""
MAX_BYTES = 1 << 30
"""Largest file of one image that is read. MAX_PIXELS with four channels of 16 bits are smaller, uncompressed and even
in base64, so a larger size is that of a damaged header."""

_SNIFFED_BYTES = 32
_ADDRESS = re.compile(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>")  # in Pillow's messages, different in every run
_FAULTS = (ValueError, KeyError)  # what simplejpeg raises; KeyError for colour spaces that it has no name for
_END = b"\xff\xd9"  # the mark that a JPEG ends with
_BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",  # the last bytes are the size of its second header
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4})*avi[fs])",
    "HEIF": rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",  # after AVIF, which may have the brand mif1 or msf1 too
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "PPM": rb"P[1-6f]\s+[-\d#]",
    "QOI": rb"qoif",
    "ICO": rb"\0\0\x01\0[^\0]\0...\0",
    "PCX": rb"\x0a[\0\x02-\x05][\0\x01][\x01\x02\x04\x08]",
    "SGI": rb"\x01\xda[\0\x01][\x01\x02]",
}
_FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # what Pillow may have been built without
_NEEDED = {
    "HEIF": "pip install pillow-heif",
    "AVIF": "Pillow 11.3 or newer",
    **{name: f"a Pillow built with {name}" for name in ("JPEG2000", "WEBP")},
}
_SNIFFED = {name: re.compile(beginning, re.DOTALL) for name, beginning in _BEGINNINGS.items()}


class DecodeError(Exception):
    """An image that cannot be decoded; becomes the row's status and reason."""

    def __init__(self, status: Status, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with only its header read: its size is checked before memory is taken for pixels.

    Raises DecodeError for no bytes, for anything but an image of FORMATS, and for more than `max_pixels`.
    """
    if not data:
        raise DecodeError(Status.EMPTY, "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise DecodeError(Status.TOO_LARGE, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        why = _why_unidentified(data) if isinstance(error, UnidentifiedImageError) else ""
        raise DecodeError(Status.UNDECODABLE, why or _reason(error)) from None
    width, height = image.size
    if width * height > max_pixels:
        reason = f"{width} x {height} is {width * height:,} pixels; the limit is {max_pixels:,}"
        raise DecodeError(Status.TOO_LARGE, reason)
    return image


def sniff(head: bytes) -> str | None:
    """The format, as FORMATS calls it, of a file that begins with `head`, 32 bytes or more; None for another. This
    installation need not be able to decode it. TGA has no signature, and is not recognised.
    """
    return next((name for name, beginning in _SNIFFED.items() if beginning.match(head[:_SNIFFED_BYTES])), None)


@cache
def _formats() -> tuple[str, ...]:
    """The formats of FORMATS that this installation can decode."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    known = (name for name in FORMATS if name in Image.OPEN)
    return tuple(name for name in known if name not in _FEATURES or features.check(_FEATURES[name]))


def _why_unidentified(data: bytes) -> str:
    """Why Pillow did not identify an image, by its first bytes alone: it is of a format that is refused, or that this
    installation cannot decode, or no image. Empty where they do not show it."""
    name = sniff(data)
    if name in _NEEDED and name not in _formats():
        return f"{name} needs {_NEEDED[name]}"
    if name:
        return f"it begins as {name} does, but is damaged, or of a kind that Pillow does not read"
    for name, (_, accept) in Image.OPEN.items():
        if name not in FORMATS and accept and accept(data[:16]):
            return f"{name} is not one of the formats that are decoded"
    return describe(data) or ""


def decode_fast(data: bytes, max_pixels: int = MAX_PIXELS) -> torch.Tensor | Image.Image:
    """Pixels of an encoded image: a uint8 RGB tensor (3, H, W) for a JPEG, else a loaded Pillow image in its own mode.

    Of an animation it is the first frame. EXIF orientation is ignored, as open_clip does. Raises DecodeError.
    """
    fault = ""
    if jpeg_size(data, max_pixels):
        try:
            return _decode_strictly(data)
        except _FAULTS as error:
            fault = str(error)
    image = open_image(data, max_pixels)
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return _load_pixels(image)
    return _decode_leniently(data, image, fault)


def decode_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A loaded Pillow image in its own mode, whatever the format: the input of open_clip's own steps. Raises
    DecodeError."""
    return _load_pixels(open_image(data, max_pixels))


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Pixels as a uint8 RGB tensor (3, H, W), whatever the format. Raises DecodeError."""
    image = decode_fast(data, max_pixels)
    return to_tensor(image) if isinstance(image, Image.Image) else image


def jpeg_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Height and width of a JPEG in grey or colour, from its header; None for anything else, and for more than
    `max_pixels`."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = decode_jpeg_header(data)
    except _FAULTS:
        return None
    return (height, width) if space in ("Gray", "YCbCr", "RGB") and height * width <= max_pixels else None


def decode_scaled(data: bytes, whole: tuple[int, int], scale: float) -> torch.Tensor:
    """A JPEG whose height and width are `whole` as a uint8 RGB tensor (3, H, W), decoded at the smallest n/8 of its
    size that is `scale` of it or more: the rest of the inverse transform is not computed. With a scale of 1, or where
    the strict decoder finds a fault, the same as `decode_rgb`. Raises DecodeError.
    """
    height, width = (math.ceil(side * scale) for side in whole)
    try:
        return _decode_strictly(data, min_height=height, min_width=width)
    except _FAULTS:
        return decode_rgb(data)


def _decode_strictly(data: bytes, **least: int) -> torch.Tensor:
    """A JPEG by simplejpeg, which raises one of _FAULTS where libjpeg would only warn."""
    import torch

    return torch.from_numpy(decode_jpeg(data, **least)).permute(2, 0, 1)


def _decode_leniently(data: bytes, image: Image.Image, fault: str) -> torch.Tensor:
    """A JPEG in which simplejpeg has found `fault`, by Pillow. Damage inside is decoded all the same; a file that is
    cut short is refused, although Pillow would do without the mark at its end."""
    if fault.startswith("Premature end of JPEG file") or _END not in data:
        raise DecodeError(Status.UNDECODABLE, "Image is incomplete or truncated")
    try:
        return to_tensor(_load_pixels(image))
    except DecodeError as error:
        raise DecodeError(Status.UNDECODABLE, fault or str(error)) from None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A Pillow image as a uint8 RGB tensor (3, H, W)."""
    import torch

    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def _load_pixels(image: Image.Image) -> Image.Image:
    """An opened image with its pixels, of eight bits per channel. Raises DecodeError."""
    try:
        image.load()
        return eight_bit(image)
    except MemoryError:
        raise
    except Exception as error:  # as in open_image
        raise DecodeError(Status.UNDECODABLE, _reason(error)) from None


def _reason(error: Exception) -> str:
    return _ADDRESS.sub("", str(error).strip().split("\n")[0])
