"""What `dimefm leaks` found, read: the rows of a store that stand in test sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.evaluation import FEATURES
from cache_schemas.leaks import LEAKED_FILE, LEAKS_FILE, Leaks
from dimefm.errors import MismatchError, StoreError
from dimefm.store.embedding_store import Store, require_same_data
from dimefm.store.parquet_tables import require_digest
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.wording import counted

AGAIN = "run dimefm leaks again, into another --out"
NO_ROWS: np.ndarray[Any, Any] = np.empty(0, np.int64)


def read_leaks(path: str) -> Leaks:
    """The document of a folder. Raises StoreError where `leaks` has not finished one, SchemaError for a damaged one."""
    where = storage.join(storage.absolute(path), LEAKS_FILE)
    if not storage.exists(path):
        raise StoreError(f"{path} does not exist", remedy=did_you_mean_path(path, "give the --out of dimefm leaks"))
    if not storage.exists(where):
        if storage.exists(storage.join(storage.absolute(path), FEATURES)):
            raise StoreError(f"{path} is unfinished", remedy="run the same dimefm leaks again")
        raise StoreError(f"{path} has no {LEAKS_FILE}", remedy="give the --out of dimefm leaks")
    return Leaks.parse(storage.read_json(where), where)


def read_pairs(path: str, document: Leaks) -> pa.Table:
    """The pairs that were looked at, LEAKED. Raises StoreError where they are damaged."""
    data = require_digest(storage.join(storage.absolute(path), LEAKED_FILE), document.digest, AGAIN)
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def unreadable_images(found: Leaks) -> list[str]:
    """A sentence for each set with test images that could not be looked for."""
    sentences = list[str]()
    for one in found.sets:
        if reasons := sorted((one.unreadable or {}).items(), key=lambda item: (-item[1], item[0])):
            what = f"{sum(count for _, count in reasons):,} of {counted(one.tested, 'image')} of {one.title}"
            why = ", ".join(f"{count:,} {status}" for status, count in reasons)
            sentences.append(f"{what} could not be encoded, and so not be looked for: {why}")
    return sentences


class LeakedRows:
    """The rows of `store` that leak, as the folder `path` says."""

    def __init__(self, path: str, store: Store) -> None:
        """Raises as `read_leaks` does, and MismatchError where it is about another store, or other embeddings."""
        self._path, self._document = path, read_leaks(path)
        if self._document.store_identity != store.schema.identity:
            what = f"{path} is about {self._document.store}, not about {store.path}"
            raise MismatchError(what, remedy="run dimefm leaks over this store")
        require_same_data(f"{path} was made", self._document.store_data, store, remedy=AGAIN)

    @property
    def digest(self) -> str:
        """That of the pairs."""
        return self._document.digest

    def rows(self) -> np.ndarray[Any, Any]:
        """int64, each once, ascending."""
        table = read_pairs(self._path, self._document)
        found: np.ndarray[Any, Any] = np.unique(table.filter(table["leak"])["row"].to_numpy())
        return found
