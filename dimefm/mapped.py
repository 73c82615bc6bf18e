"""Reading a local, uncompressed, sharded Zarr array through memory maps of its shard files.

zarr-python decodes whole chunks: thousands of random rows a second. A map reads only the rows asked for: millions.
It goes around the checksum of each chunk, so it is for stores whose shards are committed. Shapes: N rows, D width.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from zarr.codecs import Crc32cCodec, ShardingCodec

from dimefm import storage
from dimefm.errors import StoreError

_ABSENT = np.uint64(2**64 - 1)
_ENTRY = 16  # bytes of a shard index entry: offset and length, uint64 each
_CRC = 4
_REMEDY = "delete the commit of this shard and run the command that wrote the store again"


class MappedArray:
    """Rows of a 2-d array whose chunks and shards hold whole rows."""

    def __init__(self, folder: Path, array: Any, chunk_rows: int, shard_rows: int) -> None:
        self._folder = folder
        self._rows, self._width = array.shape
        self._dtype = np.dtype(array.dtype)
        self._chunk_rows = chunk_rows
        self._shard_rows = shard_rows
        self._shard = lru_cache(maxsize=4096)(self._map_shard)

    @classmethod
    def open(cls, store: str, name: str, array: Any) -> MappedArray | None:
        """A reader of array `name`, or None where the store is not local or the array is not stored as raw rows."""
        codecs = array.metadata.codecs
        if storage.is_url(store) or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
            return None
        inner = codecs[0].codecs
        if len(inner) != 2 or not isinstance(inner[1], Crc32cCodec) or array.ndim != 2:
            return None
        if codecs[0].index_location.value != "end" or array.chunks[1] != array.shape[1]:
            return None
        return cls(Path(store) / name, array, array.chunks[0], array.shards[0])

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows start..stop-1, copied out, (N, D)."""
        return self.gather(np.arange(start, stop))

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Any rows in any order, (N, D). Raises IndexError beyond the array, StoreError for a damaged shard file."""
        rows_N = np.asarray(rows_N, dtype=np.int64)
        if len(rows_N) and (rows_N.min() < 0 or rows_N.max() >= self._rows):
            raise IndexError(f"rows must lie in [0, {self._rows}), found {rows_N.min()} to {rows_N.max()}")
        out = np.empty((len(rows_N), self._width), self._dtype)
        shard_N, within_N = np.divmod(rows_N, self._shard_rows)
        for shard in np.unique(shard_N):
            chosen = np.flatnonzero(shard_N == shard) if len(rows_N) > 1 else slice(None)
            self._gather_in_shard(int(shard), within_N[chosen], out, chosen)
        return out

    def _gather_in_shard(self, shard: int, within_N: Any, out: Any, chosen: Any) -> None:
        data, offsets = self._shard(shard)
        chunk_N, row_N = np.divmod(within_N, self._chunk_rows)
        if data is None:
            out[chosen] = 0
            return
        first, step = int(offsets[0]), self._chunk_rows * self._width * self._dtype.itemsize + _CRC
        if np.array_equal(offsets, first + step * np.arange(len(offsets), dtype=np.uint64)):
            strides = (step, self._width * self._dtype.itemsize, self._dtype.itemsize)
            shape = (len(offsets), self._chunk_rows, self._width)
            view = np.ndarray(shape, self._dtype, buffer=data, offset=first, strides=strides)
            out[chosen] = view[chunk_N, row_N]
            return
        positions = np.arange(len(out))[chosen]
        for chunk in np.unique(chunk_N):
            mine = chunk_N == chunk
            out[positions[mine]] = self._chunk(data, offsets[chunk])[row_N[mine]]

    def _chunk(self, data: Any, offset: np.uint64) -> np.ndarray[Any, Any]:
        shape = (self._chunk_rows, self._width)
        if offset == _ABSENT:  # a chunk of fill values only is not stored
            return np.zeros(shape, self._dtype)
        return np.ndarray(shape, self._dtype, buffer=data, offset=int(offset))

    def _map_shard(self, shard: int) -> tuple[np.ndarray[Any, Any] | None, np.ndarray[Any, Any]]:
        """The bytes of a shard file and where each chunk begins; (None, empty) where the shard was never written."""
        path = self._folder / "c" / str(shard) / "0"
        chunks = self._shard_rows // self._chunk_rows
        data: np.ndarray[Any, Any]
        try:
            data = np.memmap(path, np.uint8, mode="r")
        except (FileNotFoundError, ValueError):  # ValueError: an empty file
            if not path.exists():
                return None, np.empty(0, np.uint64)
            data = np.empty(0, np.uint8)
        size = chunks * _ENTRY
        if len(data) < size + _CRC:
            raise StoreError(f"{path} is cut short: {len(data)} bytes", remedy=_REMEDY)
        entries = np.frombuffer(data[-size - _CRC : -_CRC].tobytes(), np.uint64).reshape(chunks, 2)
        stored = entries[entries[:, 0] != _ABSENT]
        if len(stored) and int(stored.sum(axis=1).max()) > len(data) - size - _CRC:
            raise StoreError(f"{path} is damaged: its index points beyond it", remedy=_REMEDY)
        return data, entries[:, 0]
