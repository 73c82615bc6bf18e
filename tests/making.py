"""Small inputs for tests, made from their arguments alone: the same call gives the same bytes."""

from __future__ import annotations

import base64
import gzip
import io
import tarfile
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], **options: object) -> Path:
    """A Parquet file of these rows, in row groups of two unless `options` say otherwise; `path` again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **{"row_group_size": 2, **options})
    return path


def write_text(path: Path, lines: Sequence[str]) -> Path:
    """These lines in UTF-8, compressed if the name ends in .gz; `path` again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_tsv(path: Path, images: Mapping[str, bytes], middle: str = "\t", end: str = "\n") -> Path:
    """A table of key, tab and image in base64, a line each; `path` again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{key}{middle}{base64.b64encode(data).decode()}{end}" for key, data in images.items()]
    path.write_bytes("".join(lines).encode())
    return path


def write_lineidx(path: Path) -> Path:
    """The NAME.lineidx of a NAME.tsv: the offset of every line; its path."""
    lines = path.read_bytes().splitlines(keepends=True)
    offsets = [0, *accumulate(len(line) for line in lines)][: len(lines)]
    index = path.with_suffix(".lineidx")
    index.write_text("".join(f"{offset}\n" for offset in offsets))
    return index


def upload(folder: Path, url: str) -> str:
    """Copy every file below `folder` to below `url`; `url` again."""
    fs, inner = fsspec.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{inner}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def read_tar(path: Path, limit: int) -> dict[str, bytes]:
    """The first `limit` members of a tar, name to bytes."""
    found: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member)
            if data is not None and len(found) < limit:
                found[member.name] = data.read()
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path; without commits, which say when they were made and how long that took."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "commits")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
