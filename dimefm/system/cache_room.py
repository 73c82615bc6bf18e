"""How much a cache on a local disk may take, counted over all processes, and what goes when it is full."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_COUNT = ".room"  # the lock of the folder; in it the bytes that were given out, as 8 bytes
_SLACK = 20  # a twentieth of the cache is left over when something had to go
_FREE = 10  # a tenth of the disk stays free, whatever the limit
_LEFT_OVER = 3600.0  # seconds after which an unfinished file is one of a process that was killed


class Room:
    """The room of the cache files, which end in `suffix`, below `folder`: `limit` bytes, if the disk has so many."""

    def __init__(self, folder: Path, limit: int | None, suffix: str) -> None:
        self._folder, self._limit, self._suffix = folder, limit, suffix

    def take(self, size: int, path: Path) -> bool:
        """Take room for `size` more bytes in the file at `path`; other files go for it, those that were not used for
        the longest time first. False where there is none. Raises OSError where the folder cannot be written."""
        if self._limit is not None and size > self._limit - self._limit // _SLACK:
            return False
        with self.locked() as descriptor:
            counted = os.pread(descriptor, 8, 0)
            total = int.from_bytes(counted, "little") + size
            if len(counted) < 8 or self._lacks(total, size):
                total = self._make_room(size, path) + size
                if self._lacks(total, size):
                    return False
            os.pwrite(descriptor, total.to_bytes(8, "little"), 0)
        return True

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the lock of the folder for a moment; the descriptor of the file that has the count."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / _COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with suppress(OSError):  # a file system without locks: the count may then be somewhat wrong
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def budget(self) -> int:
        """Bytes that the cache may have in all, as the disk is now."""
        room = self._used_and_files()[0] + max(0, self._free() - self._kept_free())
        return room if self._limit is None else min(room, self._limit)

    def _lacks(self, total: int, size: int) -> bool:
        return (self._limit is not None and total > self._limit) or self._free() - size < self._kept_free()

    def _free(self) -> int:
        found = os.statvfs(self._existing())
        return found.f_bavail * found.f_frsize

    def _kept_free(self) -> int:
        found = os.statvfs(self._existing())
        return found.f_blocks * found.f_frsize // _FREE

    def _existing(self) -> Path:
        return next(place for place in (self._folder, *self._folder.parents) if place.exists())

    def _make_room(self, size: int, kept: Path) -> int:
        """Remove files until `size` more bytes fit, with some to spare; how many bytes are left. Never the file `kept`,
        which they are for."""
        used, files = self._used_and_files()
        free, kept_free = self._free(), self._kept_free()
        goal = used if self._limit is None else self._limit - self._limit // _SLACK - size
        for _, taken, path in sorted(files):
            if used <= goal and free - size >= kept_free:
                break
            if path != kept:
                with suppress(OSError):
                    path.unlink()
                    used, free = used - taken, free + taken
        return used

    def _used_and_files(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """The bytes of all cache files; each file with the time of its last use, its bytes, and where it is."""
        files, old = [], time.time() - _LEFT_OVER
        for path in self._folder.glob(f"*/**/*{self._suffix}*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.name.endswith(self._suffix):
                    files.append((found.st_mtime_ns, found.st_blocks * 512, path))
                elif found.st_mtime < old:
                    path.unlink()
        return sum(taken for _, taken, _ in files), files
