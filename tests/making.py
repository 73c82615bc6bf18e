"""Small inputs for tests, made from their arguments alone: the same call gives the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(
    size: tuple[int, int] = (48, 32), colour: tuple[int, int, int] = (120, 90, 60), seed: int = 0
) -> Image.Image:
    """An RGB image of `size` (width, height): smooth waves around `colour`, other ones for every seed."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x * rng.uniform(0.05, 0.5) + rng.uniform(0, 6)) + np.cos(y * rng.uniform(0.05, 0.5)) for _ in range(3)
    ]
    pixels = np.asarray(colour, np.float64) + 45 * np.stack(waves, axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """`image` as the bytes of a file of Pillow's format `kind`."""
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def make_jpeg(size: tuple[int, int] = (48, 32), colour: tuple[int, int, int] = (120, 90, 60), seed: int = 0) -> bytes:
    """A JPEG of `picture`."""
    return encoded(picture(size, colour, seed), "JPEG", quality=90)


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar with these members, name to bytes, in this order; `path` again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_tar(path: Path, limit: int) -> dict[str, bytes]:
    """The first `limit` members of a tar, name to bytes."""
    found: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member)
            if data is not None and len(found) < limit:
                found[member.name] = data.read()
    return found
