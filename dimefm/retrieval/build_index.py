"""`build-index`: what is asked for and what is there, checked before FAISS and torch are imported. The build itself is
retrieval.index_build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cache_schemas import IndexSidecar
from cache_schemas.index import SIDECAR_FILE
from dimefm.errors import RecallError
from dimefm.retrieval.choose_index import BuildPreview, breakeven_queries, plan_index
from dimefm.retrieval.index_sidecar import is_ours, read_sidecar
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.output_folder import differing, require_only, require_same
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.machine import available_memory
from dimefm.system.output_names import require_name
from dimefm.system.shard_work import ShardRunner, run_here


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How to build an index."""

    store: str
    """Store to index."""
    out: str
    """Index to write: a local folder, such as TEXTS.index."""
    factory: str | None = None
    """FAISS factory string, such as IVF4096,Flat. Default: by the number of rows and the memory."""
    recall_target: float = 0.95
    """Recall@10 to reach, against exact search: a share from 0 to 1."""
    accept: bool = False
    """Keep an index that does not reach the recall."""
    queries: str | None = None
    """Image store whose embeddings are queries to tune and measure the recall with, as retrieve asks them. Default:
    only rows of the store itself."""
    memory: int | None = None
    """Memory that each process may use, in bytes; on the command line also as 12GB. Default: half of the machine's."""
    partial: bool = False
    """Index what an unfinished store has so far; run again to add the rest."""
    seed: int = 0
    """Seed of the training rows, of k-means and of the queries."""

    def __post_init__(self) -> None:
        if not 0 <= self.recall_target <= 1:
            raise RecallError(f"--recall must lie between 0 and 1, found {self.recall_target}", remedy="change it")


def preview_build(config: IndexConfig) -> BuildPreview:
    """What `build_index` would build over the whole store. Builds nothing."""
    _index_out(config)
    store, memory = Store(config.store), _memory(config)
    require_embeddings(store)
    rows, dim = store.schema.rows, store.schema.dim
    plan = plan_index(rows, dim, memory, config.factory)
    queries = Store(config.queries).schema.rows if config.queries else None
    return BuildPreview(rows, dim, memory, plan, breakeven_queries(rows, plan), queries)


def _index_out(config: IndexConfig) -> str:
    require_name(config.out, "an index", ".index")
    return storage.local(config.out, "an index")


def _memory(config: IndexConfig) -> int:
    return config.memory or available_memory() // 2


def build_index(
    config: IndexConfig, run_parts: ShardRunner = run_here, say: Callable[[str], None] = lambda line: None
) -> IndexSidecar:
    """Build an index over a store, tune it to the recall target and measure it; or add the rows that the store has got
    since it was built. Where it has all rows nothing is done.

    `run_parts` has the parts built; by default one after another in this process. `say` gets a line where exact search
    would be cheaper. Raises OutputExistsError where `out` was made with other settings, RecallError where the recall
    stays below the target, unless `accept`; the index that was there before stays.
    """
    config = replace(config, out=_index_out(config))
    store = Store(config.store)
    if not config.partial:
        store.require_complete()
    require_embeddings(store)
    images = Store(config.queries) if config.queries else None
    if images is not None:
        images.require_complete()
        require_embeddings(images)
        require_same_teacher(images, store)
    with writing(config.out):
        published = _published(Path(config.out), config, store, images)
        if published is None:
            require_only(config.out, "an index", is_ours)
            if (preview := preview_build(config)).exact_is_cheaper:
                say(preview.advice())
        say(f"{store.schema.rows:,} {store.schema.kind}s: opening FAISS ...")
        from dimefm.retrieval.index_build import IndexBuild  # imports torch too

        return IndexBuild(config, _memory(config), store, images, published).run(run_parts)


def _published(folder: Path, config: IndexConfig, store: Store, images: Store | None) -> IndexSidecar | None:
    """The sidecar of the index in `folder`, None where there is none. Raises OutputExistsError where it was made with
    other settings."""
    if not (folder / SIDECAR_FILE).exists():
        return None
    old = read_sidecar(str(folder))
    own: dict[str, object] = {
        "store": old.store_identity,
        "factory": old.factory,
        "seed": old.seed,
        "recall_target": old.recall_target,
        "queries": [recall.source for recall in old.recall[:-1]],
    }
    asked = {
        "store": store.schema.identity,
        "factory": config.factory or old.factory,
        "seed": config.seed,
        "recall_target": config.recall_target,
        "queries": [images.schema.kind] if images else [],
    }
    require_same(str(folder), differing(own, asked))
    return old
