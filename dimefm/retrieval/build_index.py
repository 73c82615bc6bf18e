"""`build-index`: train on a random sample, add the rows in parts, merge, tune, measure, publish.

Every step leaves a file below build/ with a document written after it, so that a run that was stopped goes on there. A
part is the rows of some shards of the store: a unit of work that needs nothing but the trained index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas import IndexPart, IndexSidecar, SchemaError, digest_of
from cache_schemas.index import BUILD, SIDECAR_FILE
from dimefm.errors import RecallError, StoreError
from dimefm.retrieval import faiss_index
from dimefm.retrieval.choose_index import RESCORE, BuildPreview, breakeven_queries, has_coarse_codes, plan_index
from dimefm.retrieval.faiss_index import IndexSearch, SearchParameters
from dimefm.retrieval.recall import Tuning, draw_recall_queries, tune
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.output_folder import differing, require_only, require_same
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.machine import available_memory
from dimefm.system.progress import Progress, amount
from dimefm.system.versions import versions

_TRAINED = "trained"


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How to build an index."""

    store: str
    """Store to index."""
    out: str
    """Index to write: a local folder ending in .index."""
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


@dataclass(frozen=True)
class PartTask:
    """A part to build: what a worker in another process needs to know. `ranges` are rows of the store, `file` is
    below `folder`."""

    store: str
    folder: str
    file: str
    settings: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of the store in it, with those that will be skipped."""
        return sum(stop - start for start, stop in self.ranges)


PartRunner = Callable[[Sequence[PartTask]], Iterable[PartTask]]
"""Builds parts with `build_part`, here or elsewhere, and yields each as it is done."""


def preview_build(config: IndexConfig) -> BuildPreview:
    """What `build_index` would do over the whole store. Builds nothing."""
    store, memory = Store(config.store), _memory(config)
    require_embeddings(store)
    rows, dim = store.schema.rows, store.schema.dim
    plan = plan_index(rows, dim, memory, config.factory)
    queries = Store(config.queries).schema.rows if config.queries else None
    return BuildPreview(rows, dim, memory, plan, breakeven_queries(rows, plan), queries)


def _memory(config: IndexConfig) -> int:
    return config.memory or available_memory() // 2


def build_index(
    config: IndexConfig, run: PartRunner | None = None, say: Callable[[str], None] = lambda line: None
) -> IndexSidecar:
    """Build an index over a store, or add to it what the store has got since; tuned to the recall target and measured.

    `run` builds the parts; default: one after another in this process. `say` is told where exact search would be
    cheaper. Nothing is done where all is there already.
    Raises OutputExistsError where `out` was made by other settings, RecallError below the target unless `accept`; what
    was there before stays.
    """
    config = replace(config, out=storage.local(config.out, "an index"))
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
        build = _Build(config, store, images)
        if build.old is None and (expected := preview_build(config)).exact_is_cheaper:
            say(expected.advice())
        return build.run(run or _one_by_one)


@dataclass
class _Base:
    """An index that rows are added to, the number of rows it was trained on, and the spread of its lists (see
    IndexSidecar)."""

    index: Any
    train_rows: int
    spread: str


class _Build:
    def __init__(self, config: IndexConfig, store: Store, images: Store | None) -> None:
        self.config, self.store, self.images = config, store, images
        self.folder = Path(config.out)
        self.old = _sidecar_of_same_settings(self.folder, config, store, images)
        self.now = store.contents.shards
        rows = sum(stop - start for start, stop in map(store.schema.shard_range, map(int, self.now)))
        if not rows:
            raise StoreError(f"{store.path} has no rows yet", remedy="run the command that writes it")
        factory = config.factory or (self.old.factory if self.old else None)
        self.memory = _memory(config)
        self.plan = plan_index(rows, store.schema.dim, self.memory, factory)
        train_rows = self.old.train_rows if self.old else self.plan.train_rows
        self.settings = digest_of([store.schema.identity, self.plan.factory, config.seed, train_rows])
        self.build = str(self.folder / BUILD)

    def run(self, run: PartRunner) -> IndexSidecar:
        """All steps, or those that are left."""
        old = self.old.shards if self.old else {}
        pending = sorted(int(shard) for shard, digest in self.now.items() if old.get(shard) != digest)
        if self.old and not pending:
            self._tidy(self.old)
            return self.old
        require_only(str(self.folder), "an index", _is_ours)
        storage.remove_leftovers(str(self.folder))
        began = time.monotonic()
        base = self._base([shard for shard in pending if str(shard) in old])
        parts = self._parts(pending, base.index)
        self._build_parts(parts, run)
        for part in parts:
            base.index = faiss_index.merged(base.index, faiss_index.read(self.folder / BUILD / part.file))
        if not base.index.ntotal:
            raise StoreError(f"{self.store.path} has no embedding at all", remedy="see dimefm info for what failed")
        return self._publish(base, self._tune(base), time.monotonic() - began)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _base(self, changed: list[int]) -> _Base:
        """What the parts are merged into: the index that is there, without the rows of shards that have changed, or a
        trained one without rows."""
        trained = self.folder / BUILD / f"{_TRAINED}.faiss"
        if self.old:
            if _document(trained, self.settings) is None:
                index = faiss_index.emptied(faiss_index.read_file(str(self.folder), self.old))
                _write(index, trained, self.settings, 0, 0, 0.0, self.old.spread)
            index = faiss_index.read_file(str(self.folder), self.old)
            for shard in changed:
                faiss_index.remove_rows(index, *self.store.schema.shard_range(shard))
            return _Base(index, self.old.train_rows, self.old.spread)
        document = _document(trained, self.settings)
        if document is None:
            began = time.monotonic()
            index, spread = faiss_index.empty(self.plan.factory, self.store.schema.dim), ""
            if faiss_index.needs_training(index):
                sample = sample_rows(self.store, self.plan.train_rows, self.config.seed)
                faiss_index.train(index, self.plan.factory, sample, self.config.seed)
                spread = faiss_index.spread_of(index, sample)
            document = _write(index, trained, self.settings, 0, 0, time.monotonic() - began, spread)
        return _Base(faiss_index.read(trained), self.plan.train_rows, document.spread)

    def _parts(self, shards: list[int], base: Any) -> list[PartTask]:
        """The pending shards in parts of about `plan.part_rows` rows; one part where parts cannot be merged."""
        whole = not faiss_index.can_merge(base)
        if whole and self.old:
            what = f"{self.folder} is a {self.plan.factory}, to which nothing can be added"
            raise StoreError(what, remedy=faiss_index.DAMAGED)
        size = len(shards) if whole else max(1, self.plan.part_rows // self.store.schema.shard_rows)
        found = []
        for at in range(0, len(shards), size):
            chosen = shards[at : at + size]
            name = digest_of([self.settings, {str(s): self.now[str(s)] for s in chosen}])[:16]
            ranges = tuple(self.store.schema.shard_range(shard) for shard in chosen)
            found.append(PartTask(self.store.path, self.build, f"part-{name}.faiss", self.settings, ranges))
        return found

    def _build_parts(self, parts: list[PartTask], run: PartRunner) -> None:
        """Build the parts that are not there.

        Raises StoreError, with the parts kept, where the whole would not fit into memory.
        """
        total = sum(part.rows for part in parts)
        pending = [part for part in parts if _document(Path(self.build) / part.file, self.settings) is None]
        done = total - sum(part.rows for part in pending)
        with Progress("indexing", total, self.store.schema.kind, done) as progress:
            for part in run(pending):
                done += part.rows
                progress.at(done)
                self._require_room(part, total)

    def _require_room(self, part: PartTask, total: int) -> None:
        needed = (Path(self.build) / part.file).stat().st_size / part.rows * total
        if needed > self.memory:
            what = f"{self.plan.factory} over {total:,} rows takes {amount(needed)}, --memory is {amount(self.memory)}"
            raise StoreError(what, remedy="give more --memory or a factory with smaller codes; the parts are kept")

    def _tune(self, base: _Base) -> Tuning:
        depths = RESCORE if has_coarse_codes(self.plan.factory) else (1,)
        ranges = [self.store.schema.shard_range(shard) for shard in sorted(map(int, self.now))]
        queries = draw_recall_queries(self.store, ranges, self.images, self.config.seed)
        index = IndexSearch(base.index, self.store, SearchParameters(0, 1), base.spread)
        tuned = tune(index, depths, queries, self.config.recall_target)
        reached = tuned.recall[0]
        if reached.value < self.config.recall_target and not self.config.accept:
            found = f"{self.plan.factory} reaches recall@{reached.k} {reached.value:.3f} for {reached.source} queries"
            short = self.config.recall_target - reached.value
            what = f"{found}, {short:.3f} below {self.config.recall_target}"
            raise RecallError(what, remedy="give another --factory, a lower --recall, or --accept; the parts are kept")
        return tuned

    def _publish(self, base: _Base, tuned: Tuning, seconds: float) -> IndexSidecar:
        """Write the index, then the sidecar that names it: until then the old one is in force."""
        written = self.folder / BUILD / "merged.faiss"
        faiss_index.write(base.index, written)
        digest = storage.digest_file(str(written))
        file = self.folder / f"index-{digest[:12]}.faiss"
        written.replace(file)
        storage.flush(str(file))
        rows = sum(stop - start for start, stop in map(self.store.schema.shard_range, map(int, self.now)))
        sidecar = IndexSidecar(
            store=self.store.path,
            store_identity=self.store.schema.identity,
            kind=self.store.schema.kind,
            shards=self.now,
            rows=int(base.index.ntotal),
            skipped=rows - int(base.index.ntotal),
            dim=self.store.schema.dim,
            teacher=self.store.schema.teacher,
            factory=self.plan.factory,
            search_parameters={"nprobe": tuned.setting.probes} if tuned.setting.probes else {},
            rescore=tuned.setting.rescore,
            spread=base.spread,
            recall=tuned.recall,
            recall_target=self.config.recall_target,
            queries_per_second=tuned.queries_per_second,
            file=file.name,
            bytes=file.stat().st_size,
            digest=digest,
            train_rows=base.train_rows,
            seconds=round(seconds, 3),
            seed=self.config.seed,
            versions={**versions(), "faiss": faiss_index.faiss_version()},
        )
        with storage.writing_to(str(self.folder)):
            storage.write_json(str(self.folder / SIDECAR_FILE), sidecar.to_json())
        self._tidy(sidecar)
        return sidecar

    def _tidy(self, sidecar: IndexSidecar) -> None:
        """Remove what the index was built from, and the file of one that was before it."""
        for stale in self.folder.glob("index-*.faiss"):
            if stale.name != sidecar.file:
                stale.unlink()
        storage.remove_folder(self.build)


def build_part(part: PartTask, threads: int | None = None, use_gpus: bool = True) -> PartTask:
    """Build one part: read the trained index, add the rows, write it and then its document. A plain function, which
    needs no more memory than the part and the trained index; on all GPUs that it sees, or on none."""
    began = time.monotonic()
    if threads:
        faiss_index.use_threads(threads)
    folder = Path(part.folder)
    index = faiss_index.read(folder / f"{_TRAINED}.faiss")
    skipped = faiss_index.add_rows(index, Store(part.store), part.ranges, use_gpus=use_gpus)
    _write(index, folder / part.file, part.settings, int(index.ntotal), skipped, time.monotonic() - began)
    return part


def _one_by_one(parts: Sequence[PartTask]) -> Iterable[PartTask]:
    return map(build_part, parts)


def _write(
    index: Any, path: Path, settings: str, rows: int, skipped: int, seconds: float, spread: str = ""
) -> IndexPart:
    faiss_index.write(index, path)
    document = IndexPart(
        settings=settings,
        rows=rows,
        skipped=skipped,
        bytes=path.stat().st_size,
        digest=storage.digest_file(str(path)),
        seconds=round(seconds, 3),
        spread=spread,
    )
    with storage.writing_to(str(path)):
        storage.write_json(str(path.with_suffix(".json")), document.to_json())
    return document


def _document(path: Path, settings: str) -> IndexPart | None:
    """The document of a file below build/; None where the file is not there or of other settings, or one of both is not
    whole: it is built again then."""
    where = path.with_suffix(".json")
    if not where.exists() or not path.exists():
        return None
    try:
        found = IndexPart.parse(storage.read_json(str(where)), str(where))
    except (StoreError, SchemaError):
        return None
    whole = found.bytes == path.stat().st_size and found.digest == storage.digest_file(str(path))
    return found if whole and found.settings == settings else None


def sample_rows(store: Store, rows: int, seed: int) -> np.ndarray[Any, Any]:
    """Embeddings of that many rows drawn at random from the shards that are done, float32 (N, D), fewer by what has
    none. Read in order of row; never the first rows, which are of one source file."""
    ranges = [store.schema.shard_range(shard) for shard in sorted(store.committed())]
    every = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    chosen = np.sort(np.random.default_rng(seed).choice(every, min(rows, len(every)), replace=False))
    out = np.empty((len(chosen), store.schema.dim), np.float32)
    found = 0
    for start, stop in ranges:
        rows_N, embedding_ND = store.valid_rows(start, stop)
        first, last = np.searchsorted(chosen, (start, stop))
        mine = embedding_ND[np.isin(rows_N, chosen[first:last], assume_unique=True)]
        out[found : found + len(mine)] = mine
        found += len(mine)
    return out[:found]


def _sidecar_of_same_settings(
    folder: Path, config: IndexConfig, store: Store, images: Store | None
) -> IndexSidecar | None:
    """The index that is there already. Raises OutputExistsError where other settings made it."""
    if not (folder / SIDECAR_FILE).exists():
        return None
    old = faiss_index.read_sidecar(str(folder))
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


def _is_ours(name: str) -> bool:
    return name in (BUILD, SIDECAR_FILE) or name.startswith("index-")
