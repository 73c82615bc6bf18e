"""Read an uncompressed, sharded Zarr array at a URL by byte ranges, with many requests at a time.

zarr-python would fetch and decode whole chunks, 1.5 MB of embeddings for one row, and keep none. Here a chunk is
fetched whole, and its checksum compared, where much of it is wanted; it is kept, up to a limit, where the rest is
likely to be wanted too. A few rows of a large chunk are fetched alone, without the checksum, which covers the whole
chunk. Shapes: N rows.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from dimefm.errors import StoreError
from dimefm.store.mapped_array import holds_raw_rows
from dimefm.store.zarr_arrays import DAMAGED
from dimefm.system import storage
from dimefm.system.read_ahead import URL_BLOCK, in_order

KEPT_BYTES = 256 * 2**20
"""Bytes of chunks that a process keeps per array: two windows of 64 chunks of embeddings 768 wide, and some more."""

_SMALL = 64 * 1024  # bytes: fetching a chunk of this size or less takes hardly longer than fetching one row of it
MANY = 8
"""Rows of a chunk: as many requests cost a core 16 ms, the 1.5 MB of all of it 9 ms (benchmarks/urls.py)."""

_NEAR = 16 * 1024  # bytes between rows that are fetched with them: less than another request costs
_ABSENT = np.uint64(2**64 - 1)
_ENTRY, _CRC = 16, 4  # bytes of an index entry, offset and length as uint64; and of a checksum

_Array = np.ndarray[Any, Any]
_Answer = TypeVar("_Answer")


class RangedArray:
    """Rows of an array whose chunks and shards hold whole rows. Safe in threads."""

    def __init__(self, folder: str, array: Any) -> None:
        self._folder = folder
        self._rows, self._row_shape, self._dtype = array.shape[0], tuple(array.shape[1:]), np.dtype(array.dtype)
        self._chunk_rows, self._in_shard = array.chunks[0], array.shards[0] // array.chunks[0]
        self._row_bytes = math.prod(self._row_shape) * self._dtype.itemsize
        self.chunk_bytes = self._chunk_rows * self._row_bytes
        self.fits = self._rows * self._row_bytes <= KEPT_BYTES
        """Whether the whole array is kept once it was fetched."""
        self.always_whole = self.chunk_bytes <= _SMALL or self.fits
        """Whether a chunk is fetched whole, however little of it is wanted."""
        self._indices: dict[int, _Array] = {}
        self._kept: OrderedDict[int, _Array] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, store: str, name: str, array: Any) -> RangedArray | None:
        """A reader of array `name`, or None where the store is local or the array is not stored as raw rows."""
        if not storage.is_url(store) or not holds_raw_rows(array):
            return None
        return cls(storage.join(store, name), array)

    def read(self, start: int, stop: int) -> _Array:
        """Rows start..stop-1, (N, ...), every checksum compared. Raises as `gather` does."""
        if not 0 <= start <= stop <= self._rows:
            raise IndexError(f"rows must lie in [0, {self._rows}], found {start} to {stop}")
        out = np.empty((stop - start, *self._row_shape), self._dtype)
        size = self._chunk_rows
        chunks = range(start // size, -(-stop // size))
        # At either end, only a part of a chunk may be wanted: its rest is likely to be wanted next.
        parts = {chunk for chunk in chunks if chunk * size < start or chunk * size + size > stop}
        for chunk, data in self._chunks(list(chunks), keep=parts):
            first, last = max(start, chunk * size), min(stop, chunk * size + size)
            out[first - start : last - start] = data[first - chunk * size : last - chunk * size]
        return out

    def gather(self, rows_N: _Array) -> _Array:
        """Any rows in any order, (N, ...). Raises IndexError beyond the array, StoreError for a shard file that is
        missing or damaged, or storage that does not answer."""
        rows_N = np.asarray(rows_N, np.int64)
        out = np.empty((len(rows_N), *self._row_shape), self._dtype)
        if not len(rows_N):
            return out
        if rows_N.min() < 0 or rows_N.max() >= self._rows:
            raise IndexError(f"rows must lie in [0, {self._rows}), found {rows_N.min()} to {rows_N.max()}")
        chunk_N, within_N = np.divmod(rows_N, self._chunk_rows)
        with self._lock:
            kept = list(self._kept)
        chunks, place_N, counts = np.unique(chunk_N, return_inverse=True, return_counts=True)
        whole = self.always_whole | (counts >= MANY) | np.isin(chunks, kept)
        wanted = chunks[whole].tolist()
        order_N = np.argsort(chunk_N, kind="stable")
        for chunk, data in self._chunks(wanted, keep=set(wanted)):
            first, last = np.searchsorted(chunk_N, (chunk, chunk + 1), sorter=order_N)
            of_chunk = order_N[first:last]
            out[of_chunk] = data[within_N[of_chunk]]
        self._gather_alone(rows_N, np.flatnonzero(~whole[place_N]), out)
        return out

    def forget(self) -> None:
        """Fetch everything again: a shard has been written again."""
        with self._lock:
            self._kept.clear()
            self._indices.clear()

    def _chunks(self, chunks: list[int], keep: set[int]) -> Iterator[tuple[int, _Array]]:
        """Whole chunks by number, first those that were kept. Those in `keep` are kept, as far as there is room."""
        with self._lock:
            found = {chunk: self._kept[chunk] for chunk in chunks if chunk in self._kept}
            for chunk in found:
                self._kept.move_to_end(chunk)
        yield from found.items()
        missing = [chunk for chunk in chunks if chunk not in found]
        self._read_indices({chunk // self._in_shard for chunk in missing})
        for run, datas in in_order(self._fetch_run, self._runs(missing)):
            for chunk, data in zip(run, datas, strict=True):
                if chunk in keep:
                    self._keep(chunk, data)
                yield chunk, data

    def _runs(self, chunks: list[int]) -> list[list[int]]:
        """Ascending chunks in runs that are fetched at once: neighbours in a shard, of URL_BLOCK bytes at most."""
        runs: list[list[int]] = []
        for chunk in chunks:
            follows = runs and chunk == runs[-1][-1] + 1 and chunk % self._in_shard
            if follows and (len(runs[-1]) + 1) * self.chunk_bytes <= URL_BLOCK:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return runs

    def _fetch_run(self, run: list[int]) -> tuple[list[int], list[_Array]]:
        shard, step = run[0] // self._in_shard, self.chunk_bytes + _CRC
        offsets = [self._offset(chunk) for chunk in run]
        if all(b - a == step for a, b in pairwise(offsets)):
            raw = self._fetch(shard, offsets[0], len(run) * step)
            pieces = [raw[at * step : (at + 1) * step] for at in range(len(run))]
        else:
            pieces = [self._fetch(shard, offset, step) for offset in offsets]
        return run, [self._checked(chunk, piece) for chunk, piece in zip(run, pieces, strict=True)]

    def _checked(self, chunk: int, piece: bytes) -> _Array:
        data = memoryview(piece)[: self.chunk_bytes]
        if google_crc32c.value(bytes(data)) != int.from_bytes(piece[self.chunk_bytes :], "little"):
            raise StoreError(f"{self._where(chunk)} is damaged: its checksum does not fit", remedy=DAMAGED)
        return np.frombuffer(data, self._dtype).reshape(self._chunk_rows, *self._row_shape)

    def _keep(self, chunk: int, data: _Array) -> None:
        with self._lock:
            self._kept[chunk] = data
            while len(self._kept) > max(1, KEPT_BYTES // self.chunk_bytes):
                self._kept.popitem(last=False)

    def _gather_alone(self, rows_N: _Array, places: _Array, out: _Array) -> None:
        """The rows at `places`, by ranges of their own or shared with rows near them."""
        if not len(places):
            return
        places = places[np.argsort(rows_N[places], kind="stable")]
        rows = rows_N[places]
        self._read_indices(set((rows // self._chunk_rows // self._in_shard).tolist()))
        apart = (np.diff(rows) - 1) * self._row_bytes > _NEAR
        apart |= np.diff(rows // self._chunk_rows) > 0
        spans = np.split(np.arange(len(rows)), np.flatnonzero(apart) + 1)
        for span, data in zip(spans, in_order(self._fetch_rows, [rows[span] for span in spans]), strict=True):
            out[places[span]] = data

    def _fetch_rows(self, rows: _Array) -> _Array:
        """Ascending rows of a chunk, by one range."""
        chunk, within = divmod(int(rows[0]), self._chunk_rows)
        count = int(rows[-1] - rows[0]) + 1
        offset = self._offset(chunk) + within * self._row_bytes
        raw = self._fetch(chunk // self._in_shard, offset, count * self._row_bytes)
        found: _Array = np.frombuffer(raw, self._dtype).reshape(count, *self._row_shape)[rows - rows[0]]
        return found

    def _offset(self, chunk: int) -> int:
        shard, number = divmod(chunk, self._in_shard)
        index = self._indices.get(shard)
        if index is None:  # another thread has written a shard in the meantime, and called `forget`
            index = self._indices[shard] = self._read_index(shard)
        offset = index[number]
        if offset == _ABSENT:
            raise StoreError(f"{self._where(chunk)} was never written", remedy=DAMAGED)
        return int(offset)

    def _read_indices(self, shards: set[int]) -> None:
        unread = sorted(shards - self._indices.keys())
        self._indices.update(zip(unread, in_order(self._read_index, unread), strict=True))

    def _read_index(self, shard: int) -> _Array:
        """Where each chunk of a shard file begins. The index is looked for where a file of chunks without gaps has it,
        and only then at the end, which takes another request for the size."""
        chunks = -(-self._rows // self._chunk_rows) - shard * self._in_shard
        end = min(chunks, self._in_shard) * (self.chunk_bytes + _CRC)
        index = self._index_at(shard, end)
        if index is None:
            size = self._within(shard, storage.size) - self._in_shard * _ENTRY - _CRC
            index = self._index_at(shard, size) if size >= 0 else None
        if index is None:
            what = f"{self._path(shard)} is damaged: the checksum of its index does not fit"
            raise StoreError(what, remedy=DAMAGED)
        return index

    def _index_at(self, shard: int, offset: int) -> _Array | None:
        size = self._in_shard * _ENTRY
        raw = self._within(shard, lambda path: storage.read_bytes(path, offset, size + _CRC))
        if len(raw) < size + _CRC or google_crc32c.value(raw[:size]) != int.from_bytes(raw[size:], "little"):
            return None
        return np.frombuffer(raw[:size], np.uint64).reshape(-1, 2)[:, 0]

    def _fetch(self, shard: int, offset: int, size: int) -> bytes:
        data = self._within(shard, lambda path: storage.read_bytes(path, offset, size))
        if len(data) != size:
            raise StoreError(f"{self._path(shard)} is damaged: it is cut short", remedy=DAMAGED)
        return data

    def _within(self, shard: int, ask: Callable[[str], _Answer]) -> _Answer:
        """The answer of `ask` for a shard file. Raises StoreError if it is missing, or the storage does not answer."""
        path = self._path(shard)
        try:
            return ask(path)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", remedy=DAMAGED) from None
        except OSError as error:
            remedy = "run the same command again once the storage answers"
            raise StoreError(f"{path} cannot be read: {error}", remedy=remedy) from error

    def _path(self, shard: int) -> str:
        return f"{self._folder}/c/{shard}{'/0' * len(self._row_shape)}"

    def _where(self, chunk: int) -> str:
        shard, number = divmod(chunk, self._in_shard)
        return f"{self._path(shard)}, chunk {number}"
