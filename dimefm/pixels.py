"""Training pixels: every decoded image as a small JPEG, one WebDataset tar a shard, in order of row."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from cache_schemas import Status
from dimefm import storage
from dimefm.decode import DecodeError
from dimefm.preprocess import resize, shortest_side

_QUALITY = 90
_LONGEST = 65_500  # pixels a side that libjpeg writes


def small_jpeg(data: bytes, image: torch.Tensor | Image.Image, side: int) -> bytes:
    """`image`, decoded from `data`, as a JPEG whose short side is `side` at most.

    A JPEG that is no larger stays as it is: nothing is lost to a second compression. Nothing is enlarged. Raises
    DecodeError where the long side is more than a JPEG can have.
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
        what = f"{small.width} x {small.height} is more than the {_LONGEST:,} pixels a side of a JPEG"
        raise DecodeError(Status.TOO_LARGE, what)
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()


class PixelTar:
    """A tar being written. Its bytes depend on the rows and their JPEGs alone."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha256, self._offset = file, hashlib.sha256(), 0

    def add(self, row: int, jpeg: bytes) -> tuple[int, int, int]:
        """Append the JPEG of a row; where in the tar it begins and ends, and its crc32c."""
        member = tarfile.TarInfo(f"{row:09d}.jpg")
        member.size, member.mode = len(jpeg), 0o644
        start = self._offset + tarfile.BLOCKSIZE
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(jpeg + bytes(-len(jpeg) % tarfile.BLOCKSIZE))
        return start, start + len(jpeg), google_crc32c.value(jpeg)

    def finish(self) -> str:
        """Write the end mark; the sha256 of the whole tar."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._offset += len(data)


@contextmanager
def pixel_tar(path: str) -> Iterator[PixelTar]:
    """A tar at `path`, there only once the block has ended without an error."""
    with storage.writing_atomically(path) as file:
        yield PixelTar(file)
