"""Opens the search over a store: by its index, or exactly where none is given."""

from __future__ import annotations

from dimefm.retrieval.exact_search import ExactSearch, Search
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.machine import choose_device

EXACT = "exact search"


def open_search(store: Store, index: str | None, device: str | None = None) -> tuple[Search, str, str]:
    """A search over `store`, and how PAIRS.zarr names it: by the path and the digest of the index, or by EXACT twice.

    Raises as `retrieval.index_search.IndexSearch.open` does.
    """
    if index is None:
        return ExactSearch(store, device=choose_device(device)), EXACT, EXACT
    from dimefm.retrieval.index_search import IndexSearch, read_sidecar

    path = storage.absolute(index)
    return IndexSearch.open(path, store), path, read_sidecar(path).digest
