"""A cache of remote files on a local disk, in blocks, shared by all processes of a machine.

A cached file is a sparse copy of the remote one. After its last byte stands a table: for each block the crc32c of what
is there, 0 where nothing is. A block is written first and entered in the table afterwards, so that a process that is
killed at any instant leaves a block that counts as absent. Each file has a lock, under which blocks are fetched: a
second process that wants the same waits, and finds them.

The name of a file holds the version of what it is a copy of. Another version is another file, and the old one is the
first to go: what was used last is kept, up to the size of the cache. A disk that is full or read-only ends nothing: one
note says so, and whoever asks reads over the network.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from dimefm.system import storage
from dimefm.system.cache_room import Room
from dimefm.system.lock import NO_LOCKS
from dimefm.system.notes import note
from dimefm.system.read_ahead import URL_BLOCK, in_order
from dimefm.system.storage.durable import UNFINISHED

BLOCK = 2**18
"""Bytes of a block, where nothing speaks for another size: a few images that were kept small."""

SUFFIX = ".cached"
_FOOTER = struct.Struct("<8sQQ")  # after the table: the mark, bytes of the remote file, bytes of a block
_MARK, _ENTRY = b"dimefm-1", 4
_PIECE = 64 << 20  # bytes that are fetched while a file is locked: others may wait for it
_WAIT, _LOOK_EVERY = 30.0, 0.02  # seconds that a lock is waited for, and between two looks at it
_FILES_AT_ONCE = 4
_TOUCH_EVERY = 10.0  # seconds

_Table = np.ndarray[Any, np.dtype[np.uint32]]
_Check = Callable[[int, bytes], bool]


class FileCache:
    """The cache in `folder`, of `limit` bytes at most; None: as much as leaves a tenth of the disk free."""

    def __init__(self, folder: str, limit: int | None = None) -> None:
        self.folder, self.limit = Path(storage.local(folder, "a cache")), limit
        self.room = Room(self.folder, limit, SUFFIX)
        self._broken = mmap.mmap(-1, 1)  # shared with the processes that are forked

    @property
    def writable(self) -> bool:
        """Whether more is put into it: not after the disk has refused it."""
        return not self._broken[0]

    def file(self, url: str, name: str, version: str, *, size: int | None = None, block: int = BLOCK) -> CachedFile:
        """The copy of the file `name` below `url`, of this version; `size` are its bytes, where they are known."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        folder = self.folder / f"{url.rstrip('/').rpartition('/')[2]}-{digest}"
        path = folder / f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:12]}{SUFFIX}"
        return CachedFile(self, storage.join(url, name), path, size, block)

    def give_up(self, error: OSError) -> None:
        """Put nothing more into it, and say so once."""
        if self.writable:
            self._broken[0] = 1
            if os.environ.get("LOCAL_RANK", "0") == "0":
                what = f"{error.strerror or error} ({error.filename or self.folder})"
                note(f"note: the cache in {self.folder} takes nothing more: {what}; the rest is read over the network")


class CachedFile:
    """The copy of one remote file, as far as it is there. Safe in threads and processes."""

    def __init__(self, cache: FileCache, url: str, path: Path, size: int | None, block: int) -> None:
        self.url, self.path, self.size, self.block = url, path, size, block
        self._cache = cache
        self._touched = 0.0

    def table(self) -> tuple[_Table, int]:
        """The checksum of each block, 0 for one that is not there, and the number of the file on its disk; an empty
        table and 0 where there is no file."""
        with suppress(OSError), self._opened(os.O_RDONLY) as descriptor:
            return self._table(descriptor), os.fstat(descriptor).st_ino
        return np.empty(0, np.uint32), 0

    def holds(self, offset: int, size: int, table: _Table) -> bool:
        """Whether the bytes [offset, offset + size) are there, by a `table` that was read before."""
        first, stop = offset // self.block, -(-(offset + size) // self.block)
        return size > 0 and stop <= len(table) and bool(table[first:stop].all())

    def read(self, offset: int, size: int) -> bytes | None:
        """The bytes [offset, offset + size), the checksums of their blocks compared; None where they are not there. A
        file with a damaged block is removed."""
        try:
            with self._opened(os.O_RDONLY) as descriptor:
                table = self._table(descriptor)
                if not self.holds(offset, size, table) or self.size is None or offset + size > self.size:
                    return None
                first, stop = offset // self.block, -(-(offset + size) // self.block)
                begin = first * self.block
                raw = os.pread(descriptor, min(stop * self.block, self.size) - begin, begin)
        except OSError:
            return None
        self.touch()
        for number in range(first, stop):
            at = number * self.block - begin
            if _checksum(raw[at : at + self.block]) != table[number]:
                self.remove()
                return None
        return raw[offset - begin : offset - begin + size]

    def fetch(self, blocks: Sequence[int], check: _Check | None = None) -> None:
        """Bring blocks, in ascending order, into the cache, as far as that is possible. One that is there is not
        fetched again; one that `check`, which gets its number and bytes, says no to is not kept."""
        try:
            step = max(1, _PIECE // self.block)
            for at in range(0, len(blocks), step):
                if not self._cache.writable or not self._fetch(np.asarray(blocks[at : at + step]), check):
                    return
        except OSError as error:
            self._cache.give_up(error)

    def touch(self) -> None:
        """Note that the file was used: those that were not for the longest time are the first to go."""
        if time.monotonic() - self._touched > _TOUCH_EVERY:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def remove(self) -> None:
        """Take the copy away, as of a file with a damaged block."""
        with suppress(OSError):
            self.path.unlink()

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        descriptor = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            length = os.fstat(descriptor).st_size
            found = os.pread(descriptor, _FOOTER.size, max(0, length - _FOOTER.size))
            mark, size, block = _FOOTER.unpack(found) if len(found) == _FOOTER.size else (b"", 0, 1)
            blocks = -(-size // max(1, block))
            fits = mark == _MARK and length == size + blocks * _ENTRY + _FOOTER.size
            if not fits or block != self.block or self.size not in (None, size):
                self.remove()  # it is damaged, or from another release
                raise FileNotFoundError(self.path)
            self.size = size
            yield descriptor
        finally:
            os.close(descriptor)

    def _table(self, descriptor: int) -> _Table:
        assert self.size is not None
        raw = os.pread(descriptor, -(-self.size // self.block) * _ENTRY, self.size)
        return np.frombuffer(raw, np.uint32)

    def _fetch(self, blocks: np.ndarray[Any, Any], check: _Check | None) -> bool:
        """`fetch` of some blocks under the lock of the file; False where the rest need not be tried."""
        with self._locked() as descriptor:
            if descriptor is None:
                return False
            missing = blocks[self._table(descriptor)[blocks] == 0].tolist()
            if not missing:
                return True
            os.utime(self.path)
            if not self._cache.room.take(min(len(missing) * self.block, self.size or 0), self.path):
                return False
            whole = True
            for run, raw in in_order(self._get, self._runs(missing), storage.CONNECTIONS // _FILES_AT_ONCE):
                whole &= bool(raw)
                for number in run if raw else ():
                    at = (number - run[0]) * self.block
                    self._keep(descriptor, number, raw[at : at + self.block], check)
            return whole

    def _keep(self, descriptor: int, number: int, data: bytes, check: _Check | None) -> None:
        assert self.size is not None
        if check is None or check(number, data):
            _write(descriptor, data, number * self.block)
            entry = int(_checksum(data)).to_bytes(_ENTRY, "little")
            _write(descriptor, entry, self.size + number * _ENTRY)

    def _runs(self, blocks: list[int]) -> list[list[int]]:
        """Ascending blocks in runs of neighbours that are fetched at once."""
        runs: list[list[int]] = []
        for block in blocks:
            if runs and block == runs[-1][-1] + 1 and (len(runs[-1]) + 1) * self.block <= max(URL_BLOCK, self.block):
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    def _get(self, run: list[int]) -> tuple[list[int], bytes]:
        """The bytes of neighbouring blocks from the remote file; none where it does not give them."""
        assert self.size is not None
        size = min((run[-1] + 1) * self.block, self.size) - run[0] * self.block
        with suppress(OSError):
            raw = storage.read_bytes(self.url, run[0] * self.block, size)
            if len(raw) == size:
                return run, raw
        return run, b""

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """A descriptor of the file, which is made if necessary and locked until the block ends. None where the remote
        file is not there, or another process does not let go of it."""
        deadline = time.monotonic() + _WAIT
        while True:
            if not self._create():
                yield None
                return
            with suppress(FileNotFoundError), self._opened(os.O_RDWR) as descriptor:
                while not _try_lock(descriptor) and time.monotonic() < deadline:
                    time.sleep(_LOOK_EVERY)
                if time.monotonic() >= deadline:
                    yield None
                    return
                if os.fstat(descriptor).st_nlink:  # else another process has removed it in the meantime
                    yield descriptor
                    return

    def _create(self) -> bool:
        """Make the file, with no block in it, unless it is there; whether the remote file is known to be."""
        if self.path.exists():
            return True
        if self.size is None:
            try:
                self.size = storage.size(self.url)
            except OSError:
                return False
        blocks = -(-self.size // self.block)
        with self._cache.room.locked():
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.path.with_name(f".{self.path.name}{UNFINISHED}")
                with temporary.open("wb") as file:
                    file.truncate(self.size)
                    file.seek(self.size)
                    file.write(bytes(blocks * _ENTRY) + _FOOTER.pack(_MARK, self.size, self.block))
                temporary.replace(self.path)
        return True


def fetch_files(wanted: Iterable[tuple[CachedFile, Sequence[int], _Check | None]]) -> None:
    """Bring blocks of several files into the cache, some files at a time."""
    for _ in in_order(lambda one: one[0].fetch(one[1], one[2]), list(wanted), _FILES_AT_ONCE):
        pass


def _checksum(data: bytes) -> int:
    """The crc32c of a block; never 0, which stands for a block that is not there."""
    return int(google_crc32c.value(data)) or 1


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True  # without locks, what two processes fetch at once is fetched twice


_active: FileCache | None = None


def active() -> FileCache | None:
    """The cache that stores at URLs are read through, in this process and those that it forks; None without one."""
    return _active


@contextmanager
def caching_in(folder: str | None, limit: int | None = None) -> Iterator[FileCache | None]:
    """Read stores at URLs that are opened within the block through a cache in `folder`; None: without one."""
    global _active
    before, _active = _active, FileCache(folder, limit) if folder else _active
    try:
        yield _active
    finally:
        _active = before
