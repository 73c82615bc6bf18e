"""The search over a text store: its FAISS index, or exact search where there is none."""

from __future__ import annotations

from dimefm.retrieval.exact_search import ExactSearch, Search
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.machine import choose_device

EXACT = "exact search"


def open_search(store: Store, index: str | None, device: str | None = None) -> tuple[Search, str, str]:
    """A search over `store`, what it is called, and its digest: of the index, or exact search where there is none.

    Raises as `dimefm.retrieval.faiss_index.IndexSearch.open` does.
    """
    if index is None:
        return ExactSearch(store, device=choose_device(device)), EXACT, EXACT
    from dimefm.retrieval.faiss_index import IndexSearch, read_sidecar

    path = storage.absolute(index)
    return IndexSearch.open(path, store), path, read_sidecar(path).digest
