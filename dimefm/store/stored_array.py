"""One sharded array of a store: its rows read around zarr where that is faster, its shards written through zarr.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dimefm.errors import StoreError
from dimefm.store.cached_array import CachedArray
from dimefm.store.mapped_array import MappedArray
from dimefm.store.ranged_array import RangedArray
from dimefm.store.zarr_arrays import DAMAGED, reading_zarr, write_rows
from dimefm.system import storage

Rows = slice | np.ndarray[Any, Any]
"""A range of rows, or any rows in any order."""


class StoredArray:
    """The array `name` of the store at `store`, opened by zarr as `array`; `damaged` is the remedy for a file that is
    missing or damaged. `version` says what is in a shard, for a cache of it."""

    def __init__(
        self,
        store: str,
        name: str,
        array: Any,
        shard_rows: int,
        damaged: str = DAMAGED,
        version: Callable[[int], str] | None = None,
    ) -> None:
        self._store, self._name, self._array, self._shard_rows, self._damaged = store, name, array, shard_rows, damaged
        self.direct = (
            MappedArray.open(store, name, array)
            or CachedArray.open(store, name, array, version)
            or RangedArray.open(store, name, array)
        )
        """The reader that goes around zarr: memory maps, of a cache where a store at a URL is read through one, or byte
        ranges; None for an array in another layout than ours."""
        self._found: set[int] = set()  # shards whose file was there

    def read(self, rows: Rows) -> np.ndarray[Any, Any]:
        """Some rows, (N, ...). Raises StoreError for rows that were never written, or are damaged."""
        if self.direct is None:
            return self.read_by_zarr(rows)
        return self.direct.read(rows.start, rows.stop) if isinstance(rows, slice) else self.direct.gather(rows)

    def read_by_zarr(self, rows: Rows) -> np.ndarray[Any, Any]:
        """The same through zarr-python, which compares every checksum, but takes a missing file for one of zeros."""
        size = self._shard_rows
        found = np.arange(rows.start // size, -(-rows.stop // size)) if isinstance(rows, slice) else rows // size
        shards = np.unique(found).tolist()
        for shard in shards:
            self._require_file(shard)
        try:
            with reading_zarr(storage.join(self._store, self._name)):
                return np.asarray(self._array[rows] if isinstance(rows, slice) else self._array.oindex[rows])
        except ValueError as error:
            where = self.file(shards[0]) if len(shards) == 1 else f"a file below {self._name}/c"
            what = f"{storage.join(self._store, where)} is damaged: its checksum does not fit"
            raise StoreError(what, remedy=self._damaged) from error

    def _require_file(self, shard: int) -> None:
        if shard not in self._found:
            path = storage.join(self._store, self.file(shard))
            if not storage.exists(path):
                raise StoreError(f"{path} is missing", remedy=self._damaged)
            self._found.add(shard)

    def file(self, shard: int) -> str:
        """The file of a shard, within the store."""
        return f"{self._name}/c/{shard}{'/0' * (self._array.ndim - 1)}"

    def write(self, shard: int, values: np.ndarray[Any, Any]) -> None:
        """Write a whole shard. Raises OSError."""
        file = self.file(shard)
        storage.remove_file(storage.join(self._store, file))  # else zarr reads it, where the last shard is not full
        write_rows(self._store, file, self._array, shard * self._shard_rows, values)
        if self.direct is not None:
            self.direct.forget()

    @property
    def by_chunks(self) -> bool:
        """Whether it is better to ask for whole chunks of rows: for an array at a URL that a process cannot keep."""
        fits = isinstance(self.direct, CachedArray | RangedArray) and self.direct.fits
        return storage.is_url(self._store) and not fits

    def fetch(self, rows_N: np.ndarray[Any, Any]) -> None:
        """Bring the chunks of some rows into the cache of this machine, if the array is read through one."""
        if isinstance(self.direct, CachedArray):
            self.direct.fetch(self.direct.chunks_of(rows_N))
