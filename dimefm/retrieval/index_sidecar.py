"""What an index says of itself, read and compared with its store without FAISS and torch."""

from __future__ import annotations

from cache_schemas import IndexSidecar, Recall
from cache_schemas.index import BUILD, SIDECAR_FILE
from dimefm.errors import MismatchError, StoreError
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.named_paths import named
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.wording import counted, rate

REBUILD = "delete the folder and build the index again"


def read_sidecar(folder: str) -> IndexSidecar:
    """The sidecar, index.json. Raises StoreError where there is none, SchemaError where it is not valid."""
    where = storage.join(folder, SIDECAR_FILE)
    if not storage.exists(where):
        remedy = did_you_mean_path(folder, "make it with dimefm build-index")
        raise StoreError(f"{folder} is not a dimefm index", remedy=remedy)
    return IndexSidecar.parse(storage.read_json(where), where)


def is_ours(name: str) -> bool:
    """Whether a file or folder of this name belongs to an index."""
    return name in (BUILD, SIDECAR_FILE) or name.startswith("index-")


def store_of(folder: str, sidecar: IndexSidecar) -> Store:
    """The store that an index is over, where its sidecar names it."""
    return Store(named(sidecar.store, storage.join(folder, SIDECAR_FILE)))


def describe_search(recall: Recall, target: float | None = None) -> str:
    """How queries of a kind are searched, as `IndexSidecar.search_of` says it, and how well."""
    words = [f"{name} {value}" for name, value in (recall.search_parameters or {}).items()]
    if recall.rescore and recall.rescore > 1:
        words.append(f"{recall.rescore} k candidates scored again from the store")
    reached = f"recall@{recall.k} {recall.value:.4f} over {counted(recall.queries, 'query', 'queries')}"
    words.append(reached if target is None else f"{reached} (target {target})")
    if recall.queries_per_second is not None:
        words.append(f"{rate(recall.queries_per_second, 1, 'query', 'queries')} when it was tuned")
    return ", ".join(words)


def require_size(folder: str, sidecar: IndexSidecar) -> str:
    """The path of the index's file. Raises StoreError where it has not the size that the sidecar says."""
    file = storage.join(folder, sidecar.file)
    size = storage.size(file) if storage.exists(file) else 0
    if size != sidecar.bytes:
        what = f"{file} has {size:,} bytes, its sidecar says {sidecar.bytes:,}"
        raise StoreError(what, remedy=f"it is damaged: {REBUILD}")
    return file


def require_index_of(path: str, sidecar: IndexSidecar, store: Store) -> None:
    """Raises MismatchError unless the index at `path` is over `store`, StoreError where it lacks rows of it."""
    if sidecar.store_identity != store.schema.identity:
        what = f"{path} was built over {sidecar.store}, not over {store.path}"
        raise MismatchError(what, remedy="build an index over this store")
    lacking = {shard for shard, digest in store.contents.shards.items() if sidecar.shards.get(shard) != digest}
    if lacking:
        what = f"{path} lacks {counted(len(lacking), 'shard')} of {store.path} that were written since it was built"
        raise StoreError(what, remedy="run the same dimefm build-index again: it adds them")
