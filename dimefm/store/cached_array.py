"""Read a Zarr array at a URL through the cache of this machine: what is there is mapped, as of a local store.

A chunk of which much is wanted is fetched into the cache, its checksum compared; a few rows of one that is not there
are fetched alone, as without a cache. What the cache cannot give, for whatever reason, is read by byte ranges. Shapes:
N rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from dimefm.errors import StoreError
from dimefm.store.mapped_array import INDEX_ENTRY, MappedArray, holds_raw_rows, maps
from dimefm.store.ranged_array import MANY, RangedArray
from dimefm.system import storage
from dimefm.system.file_cache import BLOCK, CachedFile, FileCache, active, fetch_files

_CRC = 4  # bytes of a checksum
_LOOK_EVERY = 5.0  # seconds between two looks at which files were taken out of the cache
_SHARDS_AT_ONCE = 8  # of a range that is read from beginning to end
_TRIES = 2  # for a shard whose copy was damaged

_Array = np.ndarray[Any, Any]


class CachedArray:
    """Rows of an array whose chunks and shards hold whole rows. Safe in threads.

    `version` says what is in a shard: it changes when the shard is written again. A process that was forked must open
    the array again, since connections cannot be shared.
    """

    def __init__(self, cache: FileCache, store: str, name: str, array: Any, version: Callable[[int], str]) -> None:
        self._cache, self._store, self._name, self._version = cache, store, name, version
        self._ranged = RangedArray(storage.join(store, name), array)
        self.fits = self._ranged.fits
        """As RangedArray.fits: of a small array whole chunks are always fetched."""
        self._rows, self._depth = array.shape[0], array.ndim - 1
        self._chunk_rows, self._shard_rows = array.chunks[0], array.shards[0]
        self._in_shard = self._shard_rows // self._chunk_rows
        self._chunks = -(-self._rows // self._chunk_rows)
        self._step = self._ranged.chunk_bytes + _CRC
        self._per_block = max(1, BLOCK // self._step)  # chunks
        self._mapped = _MappedCopies(array, self._path, self._bytes)
        self._here = np.zeros(-(-self._rows // self._shard_rows) * self._in_shard, bool)  # by chunk
        self._used = np.zeros(-(-self._rows // self._shard_rows), bool)  # by shard, since the last look
        self._files: dict[int, CachedFile] = {}
        self._numbers: dict[int, int] = {}  # of the files that were looked at: another number is another file
        self._damaged: dict[int, int] = {}
        self._looked = time.monotonic()

    @classmethod
    def open(cls, store: str, name: str, array: Any, version: Callable[[int], str] | None) -> CachedArray | None:
        """A reader of array `name`, or None where there is no cache, the store is local or of no known version, or the
        array is not stored as raw rows."""
        cache = active()
        if cache is None or version is None or not storage.is_url(store) or not holds_raw_rows(array):
            return None
        return cls(cache, store, name, array, version)

    def read(self, start: int, stop: int) -> _Array:
        """Rows start..stop-1, (N, ...), every checksum compared. Raises as RangedArray.read does."""
        if not 0 <= start <= stop <= self._rows:
            raise IndexError(f"rows must lie in [0, {self._rows}], found {start} to {stop}")
        step = self._shard_rows * _SHARDS_AT_ONCE
        parts = [self._read(at, min(stop, at - at % step + step)) for at in self._begins(start, stop, step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, rows_N: _Array) -> _Array:
        """Any rows in any order, (N, ...). Raises as RangedArray.gather does."""
        rows_N = np.asarray(rows_N, np.int64)
        if not len(rows_N) or rows_N.min() < 0 or rows_N.max() >= self._rows:
            return self._ranged.gather(rows_N)  # no row, or an error
        chunk_N = rows_N // self._chunk_rows
        self._take_notice(chunk_N)
        if not self._here[chunk_N].all():
            chunks, counts = np.unique(chunk_N, return_counts=True)
            self.fetch(chunks[(counts >= MANY) | self._ranged.always_whole], chunks)
        here_N = self._here[chunk_N]
        if here_N.all():
            return self._from_copies(chunk_N, lambda reader: reader.gather(rows_N))
        out = self._ranged.gather(rows_N[~here_N])
        found = np.empty((len(rows_N), *out.shape[1:]), out.dtype)
        found[~here_N] = out
        if here_N.any():
            found[here_N] = self._from_copies(chunk_N[here_N], lambda reader: reader.gather(rows_N[here_N]))
        return found

    def fetch(self, wanted: _Array, looked_for: _Array | None = None) -> None:
        """Bring chunks into the cache, as far as that is possible; and look which of those `looked_for` are there, by
        default the same."""
        chunks = wanted if looked_for is None else looked_for
        shards = np.unique(chunks[~self._here[chunks]] // self._in_shard).tolist()
        for shard in shards:
            self._look(shard)
        missing = wanted[~self._here[wanted]]
        tasks = []
        for shard in np.unique(missing // self._in_shard).tolist():
            if self._damaged.get(shard, 0) < _TRIES:
                within = missing[missing // self._in_shard == shard] - shard * self._in_shard
                blocks = np.unique([*(within // self._per_block), *self._index_blocks(shard)]).tolist()
                tasks.append((self._file(shard), blocks, self._check(shard)))
        fetch_files(tasks)
        for shard in np.unique(missing // self._in_shard).tolist():
            self._look(shard)

    def chunks_of(self, rows_N: _Array) -> _Array:
        """The chunks that hold these rows, ascending."""
        return np.unique(rows_N // self._chunk_rows)

    def forget(self) -> None:
        """A shard has been written again: it has another version now."""
        self._ranged.forget()
        self._here[:] = False
        self._files.clear()
        self._numbers.clear()
        self._mapped.forget()

    def _begins(self, start: int, stop: int, step: int) -> range | list[int]:
        return [start, *range(start - start % step + step, stop, step)]

    def _read(self, start: int, stop: int) -> _Array:
        chunks = np.arange(start // self._chunk_rows, -(-stop // self._chunk_rows))
        self._take_notice(chunks)
        if not self._here[chunks].all():
            self.fetch(chunks)
        if len(chunks) and not self._here[chunks].all():
            return self._ranged.read(start, stop)
        return self._from_copies(chunks, lambda reader: reader.read(start, stop))

    def _from_copies(self, chunk_N: _Array, ask: Callable[[MappedArray | RangedArray], _Array]) -> _Array:
        """What `ask` gets from the copies, or from the array itself where one of them is damaged or gone."""
        try:
            return ask(self._mapped)
        except StoreError:
            for shard in np.unique(chunk_N // self._in_shard).tolist():
                self._lose_if_damaged(shard)
            return ask(self._ranged)

    def _lose_if_damaged(self, shard: int) -> None:
        """Take the copy of a shard away unless all that is there of it is whole."""
        file = self._file(shard)
        table, there = file.table()
        self._forget_shard(shard)
        if there and not (self._mapped.has_order(shard) and self._is_whole(shard, file, table)):
            file.remove()
            self._damaged[shard] = self._damaged.get(shard, 0) + 1

    def _is_whole(self, shard: int, file: CachedFile, table: _Array) -> bool:
        fits, size = self._check(shard), self._bytes(shard)
        for number in np.flatnonzero(table).tolist():
            at = number * file.block
            data = file.read(at, min(file.block, size - at))
            if data is None or not fits(number, data):
                return False
        return True

    def _look(self, shard: int) -> None:
        """Look which chunks of a shard are in the cache."""
        table, number = self._file(shard).table()
        if number != self._numbers.get(shard):
            self._forget_shard(shard)
            self._numbers[shard] = number
        if len(table) and table[self._index_blocks(shard)].all():
            first, count = shard * self._in_shard, self._chunks_in(shard)
            self._here[first : first + count] = table[np.arange(count) // self._per_block] != 0

    def _forget_shard(self, shard: int) -> None:
        self._here[shard * self._in_shard : (shard + 1) * self._in_shard] = False
        self._numbers.pop(shard, None)
        self._mapped.forget_shard(shard)

    def _take_notice(self, chunk_N: _Array) -> None:
        """From time to time: mark the files that were used, and let go of those that were taken out of the cache, since
        a map of one would keep its bytes on the disk."""
        self._used[chunk_N // self._in_shard] = True
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for shard in np.flatnonzero(self._used).tolist():
            self._file(shard).touch()
        self._used[:] = False
        for shard in [shard for shard in self._numbers if not self._path(shard).exists()]:
            self._forget_shard(shard)

    def _check(self, shard: int) -> Callable[[int, bytes], bool]:
        """Whether the checksums of the chunks in a block of the shard's file fit."""
        chunks = self._chunks_in(shard)

        def fits(number: int, data: bytes) -> bool:
            first = number * self._per_block
            for at in range(min(self._per_block, max(0, chunks - first))):
                piece = data[at * self._step : (at + 1) * self._step]
                if google_crc32c.value(piece[:-_CRC]) != int.from_bytes(piece[-_CRC:], "little"):
                    return False
            return True

        return fits

    def _chunks_in(self, shard: int) -> int:
        return int(min(self._in_shard, self._chunks - shard * self._in_shard))

    def _bytes(self, shard: int) -> int:
        """Bytes of a shard's file, if its chunks have no gaps; a file with gaps is not read through the cache."""
        return int(self._chunks_in(shard) * self._step + self._in_shard * INDEX_ENTRY + _CRC)

    def _index_blocks(self, shard: int) -> range:
        block = self._step * self._per_block
        return range(self._chunks_in(shard) * self._step // block, -(-self._bytes(shard) // block))

    def _file(self, shard: int) -> CachedFile:
        if shard not in self._files:
            name = f"{self._name}/c/{shard}{'/0' * self._depth}"
            block = self._step * self._per_block
            self._files[shard] = self._cache.file(
                self._store, name, self._version(shard), size=self._bytes(shard), block=block
            )
        return self._files[shard]

    def _path(self, shard: int) -> Path:
        return self._file(shard).path


class _MappedCopies(MappedArray):
    """The copies of shard files in the cache: each is longer than the shard by the table of the cache."""

    def __init__(self, array: Any, path: Callable[[int], Path], size: Callable[[int], int]) -> None:
        super().__init__(Path(), array, array.chunks[0], array.shards[0])
        self._place, self._size = path, size

    def forget(self) -> None:
        for shard in range(-(-self._rows // self._shard_rows)):
            self.forget_shard(shard)

    def forget_shard(self, shard: int) -> None:
        """Map the copy of a shard again: it is another file now."""
        chunks = self._shard_rows // self._chunk_rows
        maps.forget(self._path(shard))
        self._shard.cache_clear()
        self._checked[shard * chunks : (shard + 1) * chunks] = False

    def has_order(self, shard: int) -> bool:
        """Whether the index of a shard can be read, and its chunks stand one after the other."""
        try:
            return self._shard(shard).regular
        except StoreError:
            return False

    def _path(self, shard: int) -> Path:
        return self._place(shard)

    def _length(self, shard: int, length: int) -> int:
        return min(length, self._size(shard))
