"""Reading a local, uncompressed, sharded Zarr array through memory maps of its shard files.

zarr-python decodes whole chunks: thousands of random rows a second. A map reads only the rows asked for: millions;
runs of whole chunks are read straight into place. The checksum of a chunk is compared when the first row of it is asked
for, once by a process and those that it forks, and with each whole read. Shapes: N rows.
"""

from __future__ import annotations

import math
import mmap
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from zarr.codecs import Crc32cCodec, ShardingCodec

from dimefm import storage
from dimefm.arrays import DAMAGED
from dimefm.errors import StoreError

_ABSENT = np.uint64(2**64 - 1)
_ENTRY = 16  # bytes of a shard index entry: offset and length, uint64 each
_CRC = 4


class MappedArray:
    """Rows of an array whose chunks and shards hold whole rows."""

    def __init__(self, folder: Path, array: Any, chunk_rows: int, shard_rows: int) -> None:
        self._folder = folder
        self._rows, self._row_shape = array.shape[0], tuple(array.shape[1:])
        self._dtype = np.dtype(array.dtype)
        self._chunk_rows, self._shard_rows = chunk_rows, shard_rows
        self._chunk_shape = (chunk_rows, *self._row_shape)
        self._chunk_bytes = math.prod(self._chunk_shape) * self._dtype.itemsize
        self._shard = lru_cache(maxsize=4096)(self._map_shard)
        chunks = -(-self._rows // shard_rows) * (shard_rows // chunk_rows)
        self._checked = np.frombuffer(mmap.mmap(-1, max(1, chunks)), bool)  # shared with the processes that are forked

    @classmethod
    def open(cls, store: str, name: str, array: Any) -> MappedArray | None:
        """A reader of array `name`, or None where the store is not local or the array is not stored as raw rows."""
        codecs = array.metadata.codecs
        if storage.is_url(store) or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
            return None
        inner = codecs[0].codecs
        if len(inner) != 2 or not isinstance(inner[1], Crc32cCodec):
            return None
        if codecs[0].index_location.value != "end" or array.chunks[1:] != array.shape[1:]:
            return None
        return cls(Path(store) / name, array, array.chunks[0], array.shards[0])

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
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

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
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
        """Map the files anew: one of them has been written again."""
        self._shard.cache_clear()
        self._checked[:] = False

    def _read_in_shard(self, shard: int, within: int, out: Any) -> None:
        file = self._shard(shard)
        with self._path(shard).open("rb", buffering=0) as raw:
            at = 0
            while at < len(out):
                chunk, row = divmod(within + at, self._chunk_rows)
                count = min(self._chunk_rows - row, len(out) - at)
                if count == self._chunk_rows:  # straight into place; its checksum is computed while it is in the cache
                    self._read_chunk(raw.fileno(), shard, file, chunk, out[at : at + count])
                else:
                    out[at : at + count] = self._chunk(shard, chunk)[row : row + count]
                at += count

    def _read_chunk(self, descriptor: int, shard: int, file: _ShardFile, chunk: int, out: Any) -> None:
        where, checksum, data = f"{self._path(shard)}, chunk {chunk}", bytearray(_CRC), out.reshape(-1).view(np.uint8)
        if file.offsets[chunk] == _ABSENT:
            raise StoreError(f"{where} was never written", remedy=DAMAGED)
        count = os.preadv(descriptor, [data, checksum], int(file.offsets[chunk]))
        if count != len(data) + _CRC or google_crc32c.value(data) != int.from_bytes(checksum, "little"):
            raise StoreError(f"{where} is damaged: its checksum does not fit", remedy=DAMAGED)

    def _gather_in_shard(self, shard: int, within_N: Any, out: Any, chosen: Any) -> None:
        file = self._shard(shard)
        chunk_N, row_N = np.divmod(within_N, self._chunk_rows)
        for chunk in np.unique(chunk_N):
            if not file.checked[chunk]:
                self._check_chunk(shard, file, int(chunk))
        if file.regular:
            strides = (self._chunk_bytes + _CRC, *np.empty(self._chunk_shape, self._dtype).strides)
            shape = (len(file.offsets), *self._chunk_shape)
            view = np.ndarray(shape, self._dtype, buffer=file.data, offset=int(file.offsets[0]), strides=strides)
            out[chosen] = view[chunk_N, row_N]
            return
        for chunk in np.unique(chunk_N):
            mine = chunk_N == chunk
            out[chosen[mine]] = self._chunk(shard, int(chunk))[row_N[mine]]

    def _chunk(self, shard: int, chunk: int) -> np.ndarray[Any, Any]:
        """The rows of one chunk, as they lie in the file."""
        file = self._shard(shard)
        if not file.checked[chunk]:
            self._check_chunk(shard, file, chunk)
        return np.ndarray(self._chunk_shape, self._dtype, buffer=file.data, offset=int(file.offsets[chunk]))

    def _check_chunk(self, shard: int, file: _ShardFile, chunk: int) -> None:
        offset, end = int(file.offsets[chunk]), int(file.offsets[chunk]) + self._chunk_bytes
        where = f"{self._path(shard)}, chunk {chunk}"
        if file.offsets[chunk] == _ABSENT:
            raise StoreError(f"{where} was never written", remedy=DAMAGED)
        if google_crc32c.value(file.data[offset:end]) != int.from_bytes(file.data[end : end + _CRC], "little"):
            raise StoreError(f"{where} is damaged: its checksum does not fit", remedy=DAMAGED)
        file.checked[chunk] = True

    def _path(self, shard: int) -> Path:
        return self._folder.joinpath("c", str(shard), *("0" for _ in self._row_shape))

    def _map_shard(self, shard: int) -> _ShardFile:
        path, chunks = self._path(shard), self._shard_rows // self._chunk_rows
        try:
            data: np.ndarray[Any, Any] = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", remedy=DAMAGED) from None
        except ValueError:  # an empty file
            data = np.empty(0, np.uint8)
        size = chunks * _ENTRY
        if len(data) < size + _CRC:
            raise StoreError(f"{path} is cut short: {len(data)} bytes", remedy=DAMAGED)
        index = data[-size - _CRC : -_CRC].tobytes()
        if google_crc32c.value(index) != int.from_bytes(data[-_CRC:], "little"):
            raise StoreError(f"{path} is damaged: the checksum of its index does not fit", remedy=DAMAGED)
        entries = np.frombuffer(index, np.uint64).reshape(chunks, 2)
        stored = entries[entries[:, 0] != _ABSENT]
        if len(stored) and int(stored.sum(axis=1).max()) > len(data) - size - _CRC:
            raise StoreError(f"{path} is damaged: its index points beyond it", remedy=DAMAGED)
        checked = self._checked[shard * chunks : (shard + 1) * chunks]
        return _ShardFile(data, entries[:, 0], checked, self._chunk_bytes + _CRC)


class _ShardFile:
    """The bytes of a shard file, where each chunk begins, and which were found whole."""

    def __init__(
        self, data: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], checked: np.ndarray[Any, Any], step: int
    ) -> None:
        self.data, self.offsets, self.checked = data, offsets, checked
        self.regular = np.array_equal(offsets, offsets[0] + np.uint64(step) * np.arange(len(offsets), dtype=np.uint64))
