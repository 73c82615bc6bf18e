"""Read the plan of a store: which sample is which row, in a Parquet file per shard.

Shapes: N rows, M rows of one shard.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import EmbeddingStore, parse_plan
from cache_schemas.embedding_store import rows_path
from cache_schemas.plan import FILES_TABLE
from dimefm.store.parquet_tables import read_table
from dimefm.system import storage

PLANS_KEPT = 4  # whole plans, of the shards asked for last
_THREADS = 4  # that read plans


class PlanReader:
    """The plans of the store at `path`. Each method raises StoreError where a table is missing or damaged."""

    def __init__(self, path: str, schema: EmbeddingStore) -> None:
        self._path, self._schema = path, schema
        self._table = lru_cache(maxsize=PLANS_KEPT)(self._read_table)

    def shard(self, shard: int) -> pa.Table:
        """See Store.plan."""
        return self._table(shard, ())

    def entries(self, rows_N: np.ndarray[Any, Any], columns: tuple[str, ...]) -> pa.Table:
        """See Store.entries."""
        shards, starts = np.unique(rows_N // self._schema.shard_rows, return_index=True)

        def read(shard: int, rows_M: np.ndarray[Any, Any]) -> pa.Table:
            return self._table(shard, columns).take(rows_M - shard * self._schema.shard_rows)

        parts = np.split(np.asarray(rows_N, np.int64), starts[1:])
        with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
            table = pa.concat_tables(pool.map(read, shards.tolist(), parts)).combine_chunks()
        return table.add_column(0, "row", pa.array(rows_N, pa.int64())) if columns else table

    def source_files(self) -> pa.Table:
        """See Store.source_files."""
        return read_table(storage.join(self._path, FILES_TABLE), self._schema.digests.get(FILES_TABLE))

    def _read_table(self, shard: int, columns: tuple[str, ...]) -> pa.Table:
        path = storage.join(self._path, rows_path(shard))
        repeated = tuple(name for name in columns if name == "file")
        table = read_table(path, self._schema.digests.get(rows_path(shard)), columns, repeated)
        return parse_plan(table, self._schema.kind, *self._schema.shard_range(shard), path, columns)
