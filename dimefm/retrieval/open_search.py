"""Opens the search over a store: by its index, or exactly where none is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dimefm.retrieval.index_sidecar import describe_search, read_sidecar, require_index_of
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.machine import choose_device
from dimefm.system.notes import note

if TYPE_CHECKING:
    from dimefm.retrieval.exact_search import Search

EXACT = "exact search"


def require_search(store: Store, index: str | None) -> None:
    """Raises what `open_search` would raise of the index's own document, before FAISS and torch are imported."""
    if index is not None:
        require_index_of(index, read_sidecar(storage.local(index, "an index")), store)


def note_search(index: str | None, kinds: Iterable[str]) -> None:
    """Say with which parameters the index is searched for queries of these kinds."""
    if index is None:
        return
    sidecar = read_sidecar(storage.local(index, "an index"))
    for kind in kinds:
        found = sidecar.search_of(kind)
        as_others = "" if found.source == kind else f", as for the {found.source} queries that alone it was tuned for"
        note(f"{kind} queries: {describe_search(found)}{as_others}")


def open_search(store: Store, index: str | None, device: str | None = None) -> tuple[Search, str, str]:
    """A search over `store`, and how PAIRS.zarr names it: by the path and the digest of the index, or by EXACT twice.

    Raises as `retrieval.index_search.IndexSearch.open` does.
    """
    if index is None:
        from dimefm.retrieval.exact_search import ExactSearch

        return ExactSearch(store, device=choose_device(device)), EXACT, EXACT
    from dimefm.retrieval.index_search import IndexSearch

    path = storage.absolute(index)
    return IndexSearch.open(path, store), path, read_sidecar(path).digest
