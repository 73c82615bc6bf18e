"""`retrieve` over stores on disk: with an index, or exactly, checked against each other before anything is written."""

from __future__ import annotations

from cache_schemas import Selection
from dimefm import storage
from dimefm.errors import StoreError
from dimefm.exact import ExactSearch
from dimefm.machine import choose_device
from dimefm.pairs import Search, retrieve
from dimefm.progress import Progress
from dimefm.store import Store, require_same_teacher
from dimefm.usable import require_embeddings

EXACT = "exact search"


def open_search(store: Store, index: str | None, device: str | None = None) -> tuple[Search, str, str]:
    """A search over `store`, what it is called, and its digest: of the index, or exact search where there is none.

    Raises as `dimefm.index.Index.open` does.
    """
    if index is None:
        return ExactSearch(store, device=choose_device(device)), EXACT, EXACT
    from dimefm.index import Index, read_sidecar

    path = storage.absolute(index)
    return Index.open(path, store), path, read_sidecar(path).digest


def retrieve_stores(
    images: str, texts: str, *, top_k: int, out: str, index: str | None = None, device: str | None = None
) -> Selection:
    """The `top_k` sentences of every image, by an index over `texts` or, without one, by exact search on `device`.

    Raises MismatchError where the teachers differ or the index is over another store, StoreError where a store is
    unfinished or has no embedding at all, and what `dimefm.pairs.retrieve` raises.
    """
    image_store, text_store = Store(images), Store(texts)
    for store, kind in ((image_store, "image"), (text_store, "text")):
        store.require_kind(kind)
        store.require_complete()
        require_embeddings(store)
    require_same_teacher(image_store, text_store)
    search, name, digest = open_search(text_store, index, device)
    with Progress("retrieving", image_store.schema.rows, "image") as progress:
        found = retrieve(
            image_store,
            text_store,
            search,
            index=name,
            index_digest=digest,
            top_k=min(top_k, text_store.schema.rows),
            out=out,
            progress=progress.at,
        )
    if not found.images:
        raise StoreError(
            f"{out}: not one sentence is found for any image", remedy="build the index again, or search exactly"
        )
    return found
