"""Pictures of the images of a labelled set, which the features of an evaluation know the places of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa

from cache_schemas import SchemaError
from cache_schemas.evaluation import FEATURES
from dimefm.errors import DimefmError
from dimefm.pages.page import Words
from dimefm.pages.pictures import Pictures
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.wording import counted


def pictures_of(
    folders: Sequence[str], title: str, keys: pa.ChunkedArray, rows: Sequence[int]
) -> tuple[dict[int, str | None], list[Words]]:
    """The pictures of some `rows` of a set, by row, and a warning where some cannot be had. `folders` are those of
    models that were measured on it, `keys` are the keys of all its images."""
    wanted_N = np.unique(np.array(rows, np.int64))
    if not len(wanted_N):
        return {}, []
    for folder in folders:
        with suppress(DimefmError, SchemaError, OSError):
            store = Store(storage.join(folder, f"{FEATURES}/{title}-test.zarr"))
            if _same_keys(store, keys, wanted_N):
                found = Pictures(store)
                return dict(zip(wanted_N.tolist(), found.of(wanted_N), strict=True)), found.notes()
    what = f"{counted(len(wanted_N), 'picture')} cannot be shown: the features of {title}, which say where its images "
    what += "lie, are gone or are of other images; evaluating it again makes them"
    return {}, [Words(what, warning=True)]


def _same_keys(store: Store, keys: pa.ChunkedArray, rows_N: np.ndarray[tuple[int], np.dtype[np.int64]]) -> bool:
    if store.schema.rows != len(keys):
        return False
    return bool(store.entries(rows_N, ("key",))["key"].to_pylist() == keys.take(pa.array(rows_N)).to_pylist())
