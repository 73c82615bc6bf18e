"""Bring a whole store at a URL into the cache of this machine, where rows from all over it are read again and again."""

from __future__ import annotations

import os

import numpy as np

from dimefm.store.embedding_store import Store
from dimefm.system.file_cache import active
from dimefm.system.progress import Progress
from dimefm.system.storage import is_url

_PART = 2**19  # rows


def bring(store: Store) -> bool:
    """Bring all embeddings of a store at a URL into the cache; whether they are there afterwards. False where they are
    more than half of what the cache may take. Of several processes of a run the first on each machine does it."""
    cache = active()
    if cache is None or not is_url(store.path) or not fits_in_cache(store):
        return False
    if not int(os.environ.get("LOCAL_RANK", "0")):
        rows = store.schema.rows
        with Progress(f"fetching {store.schema.kind}s into the cache", rows, store.schema.kind) as progress:
            for at in range(0, rows, _PART):
                store.fetch(np.arange(at, min(at + _PART, rows)))
                progress.at(min(at + _PART, rows))
    return cache.writable


def fits_in_cache(store: Store) -> bool:
    """Whether half of what the cache may take holds a store's embeddings; False without a cache."""
    cache, schema = active(), store.schema
    return cache is not None and schema.rows * schema.dim * schema.item_bytes <= cache.room.budget() // 2
