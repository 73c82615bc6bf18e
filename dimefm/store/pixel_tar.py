"""Training pixels: every decoded image as a small JPEG, in one WebDataset tar per shard, in order of row."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c

from dimefm.system import storage


class PixelTar:
    """A tar being written. Its bytes depend on the rows and their JPEGs alone."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha256, self._offset = file, hashlib.sha256(), 0

    def add(self, row: int, jpeg: bytes) -> tuple[int, int, int]:
        """Append the JPEG of a row; returns where in the tar it begins and ends, and its crc32c."""
        member = tarfile.TarInfo(f"{row:09d}.jpg")
        member.size, member.mode = len(jpeg), 0o644
        start = self._offset + tarfile.BLOCKSIZE
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(jpeg + bytes(-len(jpeg) % tarfile.BLOCKSIZE))
        return start, start + len(jpeg), google_crc32c.value(jpeg)

    def finish(self) -> str:
        """Write the end mark; returns the sha256 of the whole tar."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._offset += len(data)


@contextmanager
def pixel_tar(path: str) -> Iterator[PixelTar]:
    """A tar to write, which appears at `path` once the block has ended without an error."""
    with storage.writing_atomically(path) as file:
        yield PixelTar(file)
