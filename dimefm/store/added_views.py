"""Views that were added to a finished store: each addition is an embedding store within it, at views/<first view>/.

It has embeddings, status, numbers of views and commits of its own, so that it is written, resumed and verified as any
store is. The plan and the pixels are those of the store that it lies in. Until it is complete it is not read, and the
store has the views that it had before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cache_schemas import EmbeddingStore
from cache_schemas.embedding_store import ROWS, VIEWS, views_path
from dimefm.errors import StoreError
from dimefm.store.output_folder import is_planned
from dimefm.system import storage

if TYPE_CHECKING:  # which imports this module
    from dimefm.store.embedding_store import Store


def parent_path(path: str, schema: EmbeddingStore) -> str:
    """The store that has the plan and the pixels: the one at `path`, or for an addition the one that it lies in. Raises
    StoreError for an addition that lies elsewhere."""
    if schema.views is None or not schema.views.first:
        return path
    within = f"/{views_path(schema.views.first)}"
    if not path.endswith(within):
        what = f"{path} holds views that were added to another store, without their plan"
        raise StoreError(what, remedy=f"keep them at STORE.zarr{within}")
    return path.removesuffix(within)


def planned_additions(store: Store) -> list[Store]:
    """All additions to a store, complete or not, in the order of their views. Raises StoreError for one that is not of
    this store, or does not go on where the one before it ends."""
    views = store.made.views
    found: list[Store] = []
    if views is None or views.first:
        return found
    end = views.count
    for name in storage.listing(storage.join(store.path, VIEWS)):
        path = storage.join(storage.join(store.path, VIEWS), name)
        if not is_planned(path):  # stopped at its very beginning
            continue
        added = type(store)(path, cached=store.cached)
        stop = added.made.views.end if added.made.views else end
        if added.made != addition_schema(store.made, end, stop, added):
            what = f"{path} does not hold the views of {store.path} from number {end} on"
            raise StoreError(what, remedy="it was moved here or edited: move it away, and add the views again")
        found.append(added)
        end = stop
    return found


def is_addition(schema: EmbeddingStore) -> bool:
    """Whether these are the attributes of an addition."""
    return schema.views is not None and schema.views.first > 0


def complete_additions(store: Store, most: int | None) -> tuple[Store, ...]:
    """The additions that are read with a store: those before the first that is not complete, `most` at most. Raises
    StoreError where these are fewer than asked for."""
    found: list[Store] = []
    for added in planned_additions(store) if most != 0 else []:
        if len(found) == most or len(added.committed()) < added.schema.shards:
            break
        found.append(added)
    if most is not None and len(found) < most:
        what = f"{store.path} has no longer all the views that were read before"
        raise StoreError(what, remedy="run the command that added them again, to mend what is marked as damaged")
    return tuple(found)


def addition_schema(made: EmbeddingStore, first: int, end: int, like: Store | None = None) -> EmbeddingStore:
    """The attributes of an addition of the views first..end-1 to a store whose own are `made`; with the digests that
    `like` has of its own arrays."""
    assert made.views is not None
    plans = {name: digest for name, digest in made.digests.items() if name.startswith(f"{ROWS}/")}
    if like is not None:
        arrays = (f"{name}/zarr.json" for name in like.made.arrays())
        plans |= {name: like.made.digests[name] for name in arrays if name in like.made.digests}
    views = replace(made.views, first=first, count=end - first)
    return replace(made, views=views, pixels=None, digests=plans)


def plan_addition(store: Store, first: int, end: int) -> Store:
    """Make the arrays of an addition to a store. Raises StoreError where they cannot be written."""
    path = storage.join(store.path, views_path(first))
    if not storage.is_url(path):
        with storage.writing_to(path):
            storage.make_folder(path)  # zarr would not flush its name
    return store.create(path, addition_schema(store.made, first, end))


def store_before(addition: Store) -> Store:
    """The store that an addition lies in, with the views before its own."""
    whole = type(addition)(parent_path(addition.path, addition.made), additions=0)
    earlier = [one for one in planned_additions(whole) if one.path < addition.path]
    return type(addition)(whole.path, additions=len(earlier))
