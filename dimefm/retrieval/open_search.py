"""Opens the search over a store: by its index, or exactly where none is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dimefm.errors import StoreError
from dimefm.retrieval.index_sidecar import describe_search, read_sidecar, require_index_of, require_size
from dimefm.store.embedding_store import Store
from dimefm.store.local_copy import bring
from dimefm.system import storage
from dimefm.system.machine import choose_device
from dimefm.system.notes import note
from dimefm.system.shard_work import Seat

if TYPE_CHECKING:
    from dimefm.retrieval.exact_search import Search

EXACT = "exact search"


def require_search(store: Store, index: str | None) -> None:
    """Raises what `open_search` would raise of the index's own document and of the size of its file, before FAISS and
    torch are imported, and before anything is written."""
    if index is not None:
        folder = storage.local(index, "an index")
        sidecar = read_sidecar(folder)
        require_index_of(index, sidecar, store)
        require_size(folder, sidecar)


def note_search(index: str | None, kinds: Iterable[str]) -> None:
    """Say with which parameters the index is searched for queries of these kinds."""
    if index is None:
        return
    sidecar = read_sidecar(storage.local(index, "an index"))
    for kind in kinds:
        found = sidecar.search_of(kind)
        as_others = "" if found.source == kind else f", as for the {found.source} queries that alone it was tuned for"
        note(f"{kind} queries: {describe_search(found)}{as_others}")


def open_search(store: Store, index: str | None, device: str | None = None, *, keep: bool = False) -> Search:
    """A search over `store`; an exact one can `keep` all its rows in memory. Raises as
    `retrieval.index_search.IndexSearch.open` does."""
    if index is None:
        from dimefm.retrieval.exact_search import ExactSearch

        return ExactSearch(store, device=choose_device(device), keep=keep)
    from dimefm.retrieval.index_search import IndexSearch

    return IndexSearch.open(storage.absolute(index), store)


def name_of(index: str | None) -> tuple[str, str]:
    """How PAIRS.zarr names a search: by the path and the digest of the index, or by EXACT twice."""
    return (EXACT, EXACT) if index is None else (storage.absolute(index), read_sidecar(storage.absolute(index)).digest)


def open_in_seat(store: Store, index: str | None, digest: str, device: str | None, seat: Seat) -> Search:
    """`open_search` in a worker, for images, on its threads and its device. Raises StoreError where the index is now
    another than `name_of` said: a worker that is replaced opens it later than the others."""
    if seat.threads:
        import torch

        torch.set_num_threads(seat.threads)
        if index is not None:
            from dimefm.retrieval.faiss_index import use_threads

            use_threads(seat.threads)
    bring(store)  # all of it is read for every batch of images
    found = open_search(store, index, seat.device or device)
    if name_of(index)[1] != digest:
        remedy = "retrieve into another --out; what was retrieved by the one before is kept"
        raise StoreError(f"{index} was built again while this command runs", remedy=remedy)
    return found.of_kind("image")


def worker_bytes(index: str | None) -> int:
    """The memory of a search in each worker. FAISS can map an index from its file, so that workers share it, but copies
    the lists of 4-bit codes, which are most of the default's (faiss.IO_FLAG_MMAP_IFC, release 1.15)."""
    return 0 if index is None else read_sidecar(storage.absolute(index)).bytes
