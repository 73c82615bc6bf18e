"""A finished selection of sentences, read: what training draws from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.text_selection import PLAN_FILE, ROWS_FILE, SELECTION_FILE, TextSelection
from dimefm.errors import MismatchError, StoreError
from dimefm.store.embedding_store import Store, require_same_data
from dimefm.store.parquet_tables import require_digest
from dimefm.system import storage

_STALE = "retrieve and select again, each into another --out"
_AGAIN = "delete the folder and run dimefm select-texts again"


class SelectedTexts:
    """A selection on disk."""

    def __init__(self, path: str) -> None:
        """Open the selection at `path`. Raises StoreError where there is none or it is unfinished, SchemaError for a
        document that is not valid."""
        self.path = storage.absolute(path)
        where = storage.join(self.path, SELECTION_FILE)
        if not storage.exists(where):
            if storage.exists(storage.join(self.path, PLAN_FILE)):
                raise StoreError(f"{self.path} is unfinished", remedy="run the same dimefm select-texts again")
            raise StoreError(f"{self.path} is not a selection", remedy="make it with dimefm select-texts")
        self.document = TextSelection.parse(storage.read_json(where), where)

    def rows(self) -> np.ndarray[Any, Any]:
        """The kept rows of the text store, int32 (kept,), ascending. Raises StoreError where the file is damaged."""
        path = storage.join(self.path, ROWS_FILE)
        data = require_digest(path, self.document.digest, _AGAIN)
        table = pq.ParquetFile(pa.BufferReader(data)).read(columns=["row"], use_threads=False)
        return table["row"].to_numpy().astype(np.int32)  # type: ignore[no-any-return]

    def require_stores(self, images: Store, texts: Store) -> None:
        """Raises MismatchError unless the selection was made from these texts with the embeddings that they have now;
        and, if it was made by these images, with the embeddings that they have now."""
        plan = self.document.plan
        if plan.texts_identity != texts.schema.identity:
            what = f"{self.path} was selected from {plan.texts}, other sentences than those of {texts.path}"
            raise MismatchError(what, remedy="select from the store that is trained on")
        made = f"{self.path} was selected by pairs"
        require_same_data(made, plan.texts_data, texts, remedy=_STALE)
        if plan.images_identity == images.schema.identity:
            require_same_data(made, plan.images_data, images, remedy=_STALE)
