"""A finished selection of images, read: what training draws from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.image_selection import DROPPED_FILE, ImageSelection
from cache_schemas.text_selection import PLAN_FILE, ROWS_FILE, SELECTION_FILE
from dimefm.errors import MismatchError, StoreError
from dimefm.store.embedding_store import Store, require_same_data
from dimefm.store.parquet_tables import require_digest
from dimefm.system import storage

_AGAIN = "delete the folder and run the command that wrote it again"


class SelectedImages:
    """A selection on disk."""

    def __init__(self, path: str) -> None:
        """Open the selection at `path`. Raises StoreError where there is none or it is unfinished, SchemaError for a
        document that is not valid, or that selects sentences."""
        self.path = storage.absolute(path)
        where = storage.join(self.path, SELECTION_FILE)
        if not storage.exists(where):
            if storage.exists(storage.join(self.path, PLAN_FILE)):
                raise StoreError(f"{self.path} is unfinished", remedy="run the command that began it again")
            raise StoreError(f"{self.path} is not a selection of images", remedy="make it with dimefm select-images")
        self.document = ImageSelection.parse(storage.read_json(where), where)

    def rows(self) -> np.ndarray[Any, Any]:
        """The kept rows of the image store, int64 (kept,), ascending. Raises StoreError where the file is damaged."""
        found: np.ndarray[Any, Any] = self._table(ROWS_FILE, self.document.digest, ["row"])["row"].to_numpy()
        return found

    def copies(self) -> pa.Table:
        """The images that were left out since they repeat a kept one: COPIES. Raises as `rows` does."""
        return self._table(DROPPED_FILE, self.document.copies_digest, None)

    def _table(self, name: str, digest: str, columns: list[str] | None) -> pa.Table:
        data = require_digest(storage.join(self.path, name), digest, _AGAIN)
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)

    def require_store(self, images: Store) -> None:
        """Raises MismatchError unless the selection was made from this store, with the embeddings that it has now."""
        plan = self.document.plan
        if plan.images_identity != images.schema.identity:
            what = f"{self.path} was selected from {plan.images}, other images than those of {images.path}"
            raise MismatchError(what, remedy="select from the store that is trained on")
        made = f"{self.path} was selected"
        require_same_data(made, plan.images_data, images, remedy="select again, into another --out")
