"""Read a local, uncompressed, sharded Zarr array through memory maps of its shard files.

zarr-python decodes whole chunks: thousands of random rows per second. A map reads only the rows asked for: millions.
Ranges of rows are read straight into place, without a map. The checksum of a chunk is compared whenever it is read as a
whole; else when one of its rows is first asked for, once for a process and those that it forks. Shapes: N rows.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from zarr.codecs import Crc32cCodec, ShardingCodec

from dimefm.errors import StoreError
from dimefm.store.zarr_arrays import DAMAGED
from dimefm.system import storage
from dimefm.system.machine import open_files

_ABSENT = np.uint64(2**64 - 1)
INDEX_ENTRY = 16
"""Bytes of an entry of a shard's index: offset and length, uint64 each."""

_CRC = 4
_MOST_MAPS = 4096

_Array = np.ndarray[Any, Any]


class _Maps:
    """The memory maps used last, for all arrays of this process. Each holds a file descriptor, and the paper's stores
    have more files than a process may usually have open."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, _Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> _Array:
        """The bytes of a file. Raises FileNotFoundError."""
        with self._lock:
            data = self._maps.pop(path, None)
            if data is None:
                while len(self._maps) >= min(_MOST_MAPS, open_files() // 2):  # the other half is for everything else
                    self._maps.popitem(last=False)
                data = np.memmap(path, np.uint8, mode="r")
            self._maps[path] = data
            return data

    def forget(self, folder: Path) -> None:
        """Release the map of a file, or of the files below a folder."""
        with self._lock:
            for path in [path for path in self._maps if path == folder or folder in path.parents]:
                del self._maps[path]


maps = _Maps()


def holds_raw_rows(array: Any) -> bool:
    """Whether the chunks of a Zarr array hold whole rows, uncompressed, each with a crc32c, and the index of a shard is
    at its end."""
    codecs = array.metadata.codecs
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return False
    inner = codecs[0].codecs
    if len(inner) != 2 or not isinstance(inner[1], Crc32cCodec):
        return False
    return codecs[0].index_location.value == "end" and array.chunks[1:] == array.shape[1:]


class MappedArray:
    """Rows of an array whose chunks and shards hold whole rows."""

    def __init__(self, folder: Path, array: Any, chunk_rows: int, shard_rows: int) -> None:
        self._folder = folder
        self._rows, self._row_shape = array.shape[0], tuple(array.shape[1:])
        self._dtype = np.dtype(array.dtype)
        self._chunk_rows, self._shard_rows = chunk_rows, shard_rows
        self._chunk_shape = (chunk_rows, *self._row_shape)
        self._chunk_bytes = math.prod(self._chunk_shape) * self._dtype.itemsize
        self._shard = lru_cache(maxsize=_MOST_MAPS)(self._read_index)
        chunks = -(-self._rows // shard_rows) * (shard_rows // chunk_rows)
        self._checked = np.frombuffer(mmap.mmap(-1, max(1, chunks)), bool)  # shared with the processes that are forked

    @classmethod
    def open(cls, store: str, name: str, array: Any) -> MappedArray | None:
        """A reader of array `name`, or None where the store is not local or the array is not stored as raw rows."""
        if storage.is_url(store) or not holds_raw_rows(array):
            return None
        return cls(Path(store) / name, array, array.chunks[0], array.shards[0])

    def read(self, start: int, stop: int) -> _Array:
        """Rows start..stop-1, copied out, (N, ...). Raises as `gather` does."""
        if not 0 <= start <= stop <= self._rows:
            raise IndexError(f"rows must lie in [0, {self._rows}], found {start} to {stop}")
        out = np.empty((stop - start, *self._row_shape), self._dtype)
        first = start
        while first < stop:
            shard, within = divmod(first, self._shard_rows)
            last = min(stop, first - within + self._shard_rows)
            self._read_in_shard(shard, within, out[first - start : last - start])
            first = last
        return out

    def gather(self, rows_N: _Array) -> _Array:
        """Any rows in any order, (N, ...). Raises IndexError beyond the array, StoreError for a shard file that is
        missing or damaged."""
        rows_N = np.asarray(rows_N, dtype=np.int64)
        out = np.empty((len(rows_N), *self._row_shape), self._dtype)
        if not len(rows_N):
            return out
        if rows_N.min() < 0 or rows_N.max() >= self._rows:
            raise IndexError(f"rows must lie in [0, {self._rows}), found {rows_N.min()} to {rows_N.max()}")
        shard_N, within_N = np.divmod(rows_N, self._shard_rows)
        order_N = np.argsort(shard_N, kind="stable")
        shards, starts = np.unique(shard_N[order_N], return_index=True)
        for shard, chosen in zip(shards.tolist(), np.split(order_N, starts[1:]), strict=True):
            self._gather_in_shard(shard, within_N[chosen], out, chosen)
        return out

    def forget(self) -> None:
        """Map the files again: one of them has been written again."""
        maps.forget(self._folder)
        self._shard.cache_clear()
        self._checked[:] = False

    def _read_in_shard(self, shard: int, within: int, out: Any) -> None:
        file = self._shard(shard)
        with self._open(shard) as raw:
            at = 0
            while at < len(out):
                chunk, row = divmod(within + at, self._chunk_rows)
                count = min(self._chunk_rows - row, len(out) - at)
                if count == self._chunk_rows:  # straight into place; its checksum is computed while it is in the cache
                    self._read_chunk(raw.fileno(), shard, file, chunk, out[at : at + count])
                else:
                    whole = np.empty(self._chunk_shape, self._dtype)
                    self._read_chunk(raw.fileno(), shard, file, chunk, whole)
                    out[at : at + count] = whole[row : row + count]
                at += count

    def _read_chunk(self, descriptor: int, shard: int, file: _ShardIndex, chunk: int, out: Any) -> None:
        where, checksum, data = f"{self._path(shard)}, chunk {chunk}", bytearray(_CRC), out.reshape(-1).view(np.uint8)
        if file.offsets[chunk] == _ABSENT:
            raise StoreError(f"{where} was never written", remedy=DAMAGED)
        count = os.preadv(descriptor, [data, checksum], int(file.offsets[chunk]))
        if count != len(data) + _CRC or google_crc32c.value(data) != int.from_bytes(checksum, "little"):
            raise StoreError(f"{where} is damaged: its checksum does not fit", remedy=DAMAGED)

    def _gather_in_shard(self, shard: int, within_N: _Array, out: _Array, chosen: _Array) -> None:
        file = self._shard(shard)
        try:
            data = maps.get(self._path(shard))
        except FileNotFoundError:
            raise StoreError(f"{self._path(shard)} is missing", remedy=DAMAGED) from None
        # Reading a map beyond the present end of its file is a SIGBUS. Asking for that end takes a microsecond.
        mapping: Any = data.base
        there = min(len(data), mapping.size())
        if there < file.bytes:
            what = f"{self._path(shard)} was cut short while it was in use: {there:,} of {file.bytes:,} bytes are left"
            raise StoreError(what, remedy=DAMAGED)
        chunk_N, row_N = np.divmod(within_N, self._chunk_rows)
        for chunk in np.unique(chunk_N).tolist():
            if not file.checked[chunk]:
                self._check_chunk(shard, file, data, chunk)
        if file.regular:
            strides = (self._chunk_bytes + _CRC, *np.empty(self._chunk_shape, self._dtype).strides)
            shape = (len(file.offsets), *self._chunk_shape)
            view = np.ndarray(shape, self._dtype, buffer=data, offset=int(file.offsets[0]), strides=strides)
            out[chosen] = view[chunk_N, row_N]
            return
        for chunk in np.unique(chunk_N).tolist():
            mine, offset = chunk_N == chunk, int(file.offsets[chunk])
            out[chosen[mine]] = np.ndarray(self._chunk_shape, self._dtype, buffer=data, offset=offset)[row_N[mine]]

    def _check_chunk(self, shard: int, file: _ShardIndex, data: _Array, chunk: int) -> None:
        offset, end = int(file.offsets[chunk]), int(file.offsets[chunk]) + self._chunk_bytes
        where = f"{self._path(shard)}, chunk {chunk}"
        if file.offsets[chunk] == _ABSENT:
            raise StoreError(f"{where} was never written", remedy=DAMAGED)
        if google_crc32c.value(data[offset:end]) != int.from_bytes(data[end : end + _CRC], "little"):
            raise StoreError(f"{where} is damaged: its checksum does not fit", remedy=DAMAGED)
        file.checked[chunk] = True

    def _path(self, shard: int) -> Path:
        return self._folder.joinpath("c", str(shard), *("0" for _ in self._row_shape))

    def _length(self, shard: int, length: int) -> int:
        """Bytes of the shard in a file of this length."""
        return length

    @contextmanager
    def _open(self, shard: int) -> Iterator[Any]:
        path = self._path(shard)
        try:
            with storage.naming(str(path)), path.open("rb", buffering=0) as file:
                yield file
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", remedy=DAMAGED) from None

    def _read_index(self, shard: int) -> _ShardIndex:
        path, chunks = self._path(shard), self._shard_rows // self._chunk_rows
        size = chunks * INDEX_ENTRY
        with self._open(shard) as raw:
            length = self._length(shard, os.fstat(raw.fileno()).st_size)
            if length < size + _CRC:
                raise StoreError(f"{path} is cut short: {length} bytes", remedy=DAMAGED)
            index = os.pread(raw.fileno(), size + _CRC, length - size - _CRC)
        if google_crc32c.value(index[:size]) != int.from_bytes(index[size:], "little"):
            raise StoreError(f"{path} is damaged: the checksum of its index does not fit", remedy=DAMAGED)
        entries = np.frombuffer(index[:size], np.uint64).reshape(chunks, 2)
        begins = entries[entries[:, 0] != _ABSENT, 0]
        if len(begins) and int(begins.max()) > length - size - _CRC - (self._chunk_bytes + _CRC):
            raise StoreError(f"{path} is damaged: its index points beyond it", remedy=DAMAGED)
        checked = self._checked[shard * chunks : (shard + 1) * chunks]
        return _ShardIndex(length, entries[:, 0], checked, self._chunk_bytes + _CRC)


class _ShardIndex:
    """The size of a shard file, where each chunk begins, and which chunks were checked."""

    def __init__(self, length: int, offsets: _Array, checked: _Array, step: int) -> None:
        self.bytes, self.offsets, self.checked = length, offsets, checked
        self.regular = np.array_equal(offsets, offsets[0] + np.uint64(step) * np.arange(len(offsets), dtype=np.uint64))
