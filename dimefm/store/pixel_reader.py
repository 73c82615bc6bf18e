"""Read the images that a store has kept as small JPEGs: from its tars, or from the cache of this machine.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import numpy as np

from cache_schemas import EmbeddingStore
from cache_schemas.embedding_store import pixels_path
from dimefm.errors import StoreError
from dimefm.store.zarr_arrays import DAMAGED
from dimefm.system import storage
from dimefm.system.file_cache import CachedFile, active, fetch_files
from dimefm.system.read_ahead import reading_ahead

_Rows = np.ndarray[Any, Any]
_Place = tuple[int, list[int]]  # a row; where in the tar of its shard its JPEG begins and ends, and its crc32c


class PixelReader:
    """The tars of the store at `path`; `version` says what is in a shard, for a cache of it."""

    def __init__(self, path: str, schema: EmbeddingStore, version: Callable[[int], str]) -> None:
        self._path, self._schema, self._version = path, schema, version
        self._files: dict[int, CachedFile] = {}

    def jpegs(self, rows_N: _Rows, index_N3: _Rows) -> Iterator[bytes]:
        """The JPEGs of rows at their places. Those that are not in the cache are asked for many at a time."""
        places: list[_Place] = list(zip(rows_N.tolist(), index_N3.tolist(), strict=True))
        if active() is None or not storage.is_url(self._path):
            yield from reading_ahead(self._jpeg, places, self._path)
            return
        shards = {place[0] // self._schema.shard_rows for place in places}
        tables = {shard: self._file(shard).table()[0] for shard in shards}
        far = {place[0] for place in places if not self._holds(place, tables)}
        missing = reading_ahead(self._jpeg, [place for place in places if place[0] in far], self._path)
        for place in places:
            yield next(missing) if place[0] in far else self._from_cache(place)

    def fetch(self, rows_N: _Rows, index_N3: _Rows) -> None:
        """Bring the part of each tar that has rows, in ascending order, into the cache: from the first of each chunk to
        its last, for rows of a chunk are wanted together."""
        there = index_N3[:, 1] > index_N3[:, 0]
        rows_N, index_N3 = rows_N[there], index_N3[there]
        cuts = np.flatnonzero(np.diff(rows_N // self._schema.chunk_rows)) + 1
        wanted: dict[int, set[int]] = {}
        for rows, index in zip(np.split(rows_N, cuts), np.split(index_N3, cuts), strict=True):
            if len(rows):
                shard = int(rows[0]) // self._schema.shard_rows
                block, begin, end = self._file(shard).block, int(index[:, 0].min()), int(index[:, 1].max())
                wanted.setdefault(shard, set()).update(range(begin // block, -(-end // block)))
        fetch_files((self._file(shard), sorted(blocks), None) for shard, blocks in wanted.items())

    def _holds(self, place: _Place, tables: dict[int, Any]) -> bool:
        row, (start, stop, _) = place
        shard = row // self._schema.shard_rows
        return self._file(shard).holds(start, stop - start, tables[shard])

    def _from_cache(self, place: _Place) -> bytes:
        row, (start, stop, checksum) = place
        file = self._file(row // self._schema.shard_rows)
        jpeg = file.read(start, stop - start)
        if jpeg is not None and google_crc32c.value(jpeg) == checksum:
            return jpeg
        file.remove()  # damaged on its way here; or it has just made room for others
        return self._jpeg(place)

    def _jpeg(self, place: _Place) -> bytes:
        row, (start, stop, checksum) = place
        path = storage.join(self._path, pixels_path(row // self._schema.shard_rows))
        try:
            jpeg = storage.read_bytes(path, start, stop - start)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", remedy=DAMAGED) from None
        if google_crc32c.value(jpeg) != checksum:
            raise StoreError(f"{path}, row {row} is damaged: its checksum does not fit", remedy=DAMAGED)
        return jpeg

    def _file(self, shard: int) -> CachedFile:
        if shard not in self._files:
            cache = active()
            assert cache is not None
            self._files[shard] = cache.file(self._path, pixels_path(shard), self._version(shard))
        return self._files[shard]
