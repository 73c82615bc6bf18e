"""A window that slides forward over a file: few reads for small steps, few bytes for long ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dimefm.system import storage
from dimefm.system.read_ahead import URL_BLOCK

URL_LEAP = 1 << 20
"""At a URL, this many bytes or more are passed over rather than read. By s3fs a request costs a core 2 ms, in which it
reads 1.2 MB; and a round trip takes 30 ms, in which each of 32 connections that share 10 Gb/s carries 1 MB."""

_GROWTH = 4


class Window:
    """The part of a file that was read last, which slides forward.

    `read(offset, size)` must give these bytes, fewer only at the end of the file. Reads grow from `least` to `most`
    bytes while the wanted bytes follow closely, and are `least` again after a leap of more than `leap` bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], least: int, most: int, leap: int) -> None:
        self._read, self._least, self._most, self._leap, self._chunk = read, least, most, leap, least
        self._start, self._data, self._last = 0, b"", False

    def get(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""
        at = offset - self._start
        if at < 0 or (at + size > len(self._data) and not self._last):
            leaps = not self._data or at < 0 or at - len(self._data) > self._leap
            self._chunk = self._least if leaps else min(_GROWTH * self._chunk, self._most)
            wanted = max(self._chunk, size)
            self._data = self._read(offset, wanted)
            self._start, self._last, at = offset, len(self._data) < wanted, 0
        return self._data[at : at + size]


@contextmanager
def open_window(path: str) -> Iterator[Window]:
    """A window over a local file, with reads of 4 to 128 KB, or over a file at a URL, with reads of 16 KB to 8 MB.
    Raises OSError."""
    if storage.is_url(path):
        yield Window(lambda offset, size: storage.read_bytes(path, offset, size), 1 << 14, URL_BLOCK, URL_LEAP)
        return
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        yield Window(lambda offset, size: _read(file.fileno(), offset, size), 1 << 12, 1 << 17, 1 << 16)


def _read(file: int, offset: int, size: int) -> bytes:
    """Bytes of an open file, fewer only at its end: some file systems give fewer than were asked for."""
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data
