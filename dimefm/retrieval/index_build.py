"""The build of an index: train on a random sample, add the rows in parts, merge, tune, measure, publish.

The trained index and every part (`retrieval.index_parts`) are kept below build/ until the index is published: a build
that was stopped goes on where it stopped.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import IndexSidecar, Recall, digest_of
from cache_schemas.index import BUILD, SIDECAR_FILE
from dimefm.errors import RecallError, StoreError
from dimefm.retrieval.choose_index import PROGRAM, RESCORE, has_coarse_codes, most_part_rows, plan_index
from dimefm.retrieval.faiss_index import FaissIndex, faiss_version
from dimefm.retrieval.index_merge import ListMerge
from dimefm.retrieval.index_parts import TRAINED_FILE, BuildParts, PartTask, finished_part, write_part
from dimefm.retrieval.index_search import IndexSearch, SearchParameters, read_index, whole_file
from dimefm.retrieval.index_sidecar import REBUILD, is_ours
from dimefm.retrieval.recall import RecallQueries, draw_recall_queries, tune
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import require_only
from dimefm.system import storage
from dimefm.system.notes import note
from dimefm.system.progress import Progress, amount
from dimefm.system.shard_work import ShardRunner
from dimefm.system.versions import versions

if TYPE_CHECKING:
    from dimefm.retrieval.build_index import IndexConfig


class IndexBuild:
    """The steps of one build: of a new index, or of the rows that a published one lacks."""

    def __init__(
        self, config: IndexConfig, memory: int, store: Store, images: Store | None, published: IndexSidecar | None
    ) -> None:
        self.config, self.memory, self.store, self.images, self.published = config, memory, store, images, published
        self.folder = Path(config.out)
        self.shards = store.contents.shards
        if not self._rows():
            raise StoreError(f"{store.path} has no rows yet", remedy="run the command that writes it")
        factory = config.factory or (self.published.factory if self.published else None)
        self.plan = plan_index(self._rows(), store.schema.dim, self.memory, factory)
        self.train_rows = self.published.train_rows if self.published else self.plan.train_rows
        self.settings = digest_of([store.schema.identity, self.plan.factory, config.seed, self.train_rows])
        self.build = self.folder / BUILD
        self.trained, self.merged = self.build / TRAINED_FILE, self.build / "merged.faiss"

    def _ranges(self) -> list[tuple[int, int]]:
        """The rows of the shards that are done."""
        return [self.store.schema.shard_range(shard) for shard in sorted(map(int, self.shards))]

    def _rows(self) -> int:
        return sum(stop - start for start, stop in self._ranges())

    def run(self, run_parts: ShardRunner) -> IndexSidecar:
        """Every step, or those that are left."""
        indexed = self.published.shards if self.published else {}
        pending = sorted(int(shard) for shard, digest in self.shards.items() if indexed.get(shard) != digest)
        if self.published and not pending:
            self._remove_stale_files(self.published)
            return self.published
        require_only(str(self.folder), "an index", is_ours)
        storage.remove_leftovers(str(self.folder))
        began = time.monotonic()
        spread = self._train()
        trained = FaissIndex.read(self.trained, spread)
        parts = self._parts(pending, trained)
        self._build_parts(parts, run_parts)
        self._merge(trained, parts, changed=[shard for shard in pending if str(shard) in indexed])
        queries = draw_recall_queries(self.store, self._ranges(), self.images, self.config.seed)
        index = FaissIndex.read(self.merged, spread, mapped=True)
        if not index.rows:
            raise StoreError(f"{self.store.path} has no embedding at all", remedy="see dimefm info for what failed")
        return self._publish(index, self._tune(index, queries), time.monotonic() - began)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        """Write the trained index, without rows, that every part starts from, unless it is there; its spread.

        Where an index is published it is that one without its rows, so that its parts can be merged into it.
        """
        if document := finished_part(self.trained, self.settings):
            return document.spread
        began = time.monotonic()
        if self.published:
            index = read_index(str(self.folder), self.published)
            index.remove_all_rows()
        else:
            index = FaissIndex.from_factory(self.plan.factory, self.store.schema.dim)
        self._require_memory(index)
        if index.needs_training:
            index.train(sample_rows(self.store, self.train_rows, self.config.seed), self.config.seed)
        return write_part(index, self.trained, self.settings, seconds=time.monotonic() - began).spread

    def _parts(self, shards: list[int], trained: FaissIndex) -> list[PartTask]:
        """The pending shards in parts of about `plan.part_rows` rows, fewer where they are so wide that memory would
        not hold a part; in one part where parts cannot be merged."""
        if self.published and not trained.can_merge:
            what = f"{self.folder} is a {self.plan.factory}, to which nothing can be added"
            raise StoreError(what, remedy=REBUILD)
        schema = self.store.schema
        rows = min(self.plan.part_rows, most_part_rows(self.memory, trained.row_bytes()))
        size = max(1, rows // schema.shard_rows) if trained.can_merge else len(shards)
        parts = []
        for at in range(0, len(shards), size):
            chosen = shards[at : at + size]
            name = digest_of([self.settings, {str(shard): self.shards[str(shard)] for shard in chosen}])[:16]
            ranges = tuple(schema.shard_range(shard) for shard in chosen)
            parts.append(PartTask(self.store.path, str(self.build), f"part-{name}.faiss", self.settings, ranges))
        return parts

    def _build_parts(self, parts: list[PartTask], run_parts: ShardRunner) -> None:
        """Build the parts that are missing."""
        total = sum(part.rows for part in parts)
        pending = [part for part in parts if finished_part(part.path, self.settings) is None]
        done = total - sum(part.rows for part in pending)
        with Progress("indexing", total, self.store.schema.kind, done) as progress:
            for part, _ in run_parts(BuildParts(), pending, progress.note):
                done += part.rows
                progress.at(done)

    def _require_memory(self, index: FaissIndex) -> None:
        """Raises StoreError where the index must be in memory to be searched, and will not fit."""
        needed = self._rows() * index.row_bytes() + PROGRAM
        if needed > self.memory and not index.lists_stay_in_file:
            what = f"{self.plan.factory} over {self._rows():,} rows must be in memory to be searched, and takes"
            remedy = "give more --memory, smaller codes, or lists that stay in their file, such as IVF4096,SQ8"
            raise StoreError(f"{what} {amount(needed)}; --memory is {amount(self.memory)}", remedy=remedy)

    def _merge(self, trained: FaissIndex, parts: list[PartTask], changed: list[int]) -> None:
        """Write the published index, without the rows of shards that have changed, and the parts as one file."""
        dropped = [self.store.schema.shard_range(shard) for shard in changed]
        files = [part.path for part in parts]
        if self.published:
            files.insert(0, whole_file(str(self.folder), self.published))
        if ListMerge.suits(trained):
            with Progress("merging", self._rows(), self.store.schema.kind) as progress:
                ListMerge(trained).write(files, self.merged, dropped, progress.at)
                progress.at(self._rows())
            return
        index = FaissIndex.read(files[0]) if self.published else trained
        for start, stop in dropped:
            index.remove_rows(start, stop)
        for part in parts:
            index.merge(FaissIndex.read(part.path))
        index.write(self.merged)

    def _tune(self, index: FaissIndex, queries: Sequence[RecallQueries]) -> tuple[Recall, ...]:
        """The search parameters for each kind of query. Raises RecallError where none reach the recall for the first
        kind, unless that is accepted; of another kind that is a note, and what comes close to the best is kept."""
        depths = RESCORE if has_coarse_codes(self.plan.factory) else (1,)
        search, target = IndexSearch(index, self.store, SearchParameters(0, 1)), self.config.recall_target
        tuned = list[Recall]()
        for kind in queries:
            note(f"tuning for {kind.source} queries ...")
            reached = tune(search, depths, kind, target)
            if reached.value < target:
                of_what = f"recall@{reached.k} {reached.value:.3f} for {reached.source} queries"
                what = f"{self.plan.factory} reaches {of_what}, {target - reached.value:.3f} below {target}"
                if not tuned and not self.config.accept:
                    remedy = "give another --factory, a lower --recall, or --accept; the parts are kept"
                    raise RecallError(what, remedy=remedy)
                note(what)
            tuned.append(reached)
        return tuple(tuned)

    def _publish(self, index: FaissIndex, recall: tuple[Recall, ...], seconds: float) -> IndexSidecar:
        """Name the index, then write the sidecar that names it: until then the one before is in force."""
        digest = storage.digest_file(str(self.merged))
        file = self.folder / f"index-{digest[:12]}.faiss"
        self.merged.replace(file)
        storage.flush(str(file))
        sidecar = IndexSidecar(
            store=self.store.path,
            store_identity=self.store.schema.identity,
            kind=self.store.schema.kind,
            shards=self.shards,
            rows=index.rows,
            skipped=self._rows() - index.rows,
            dim=self.store.schema.dim,
            teacher=self.store.schema.teacher,
            factory=self.plan.factory,
            search_parameters=recall[0].search_parameters or {},
            rescore=recall[0].rescore or 1,
            spread=index.spread,
            recall=recall,
            recall_target=self.config.recall_target,
            queries_per_second=recall[0].queries_per_second or 0.0,
            file=file.name,
            bytes=file.stat().st_size,
            digest=digest,
            train_rows=self.train_rows,
            seconds=round(seconds, 3),
            seed=self.config.seed,
            versions={**versions(), "faiss": faiss_version()},
        )
        with storage.writing_to(str(self.folder)):
            storage.write_json(str(self.folder / SIDECAR_FILE), sidecar.to_json())
        self._remove_stale_files(sidecar)
        return sidecar

    def _remove_stale_files(self, sidecar: IndexSidecar) -> None:
        """Remove what the index was built from, and the file of the index before it."""
        for stale in self.folder.glob("index-*.faiss"):
            if stale.name != sidecar.file:
                stale.unlink()
        storage.remove_folder(str(self.build))


def sample_rows(store: Store, rows: int, seed: int) -> np.ndarray[Any, Any]:
    """Embeddings of `rows` rows drawn at random from the shards that are done, float32 (N, D); fewer by those rows that
    have none. Drawn, because the first rows are all from one source file; read in the order of their rows."""
    ranges = [store.schema.shard_range(shard) for shard in sorted(store.committed())]
    every = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    drawn = np.sort(np.random.default_rng(seed).choice(every, min(rows, len(every)), replace=False))
    sample_ND = np.empty((len(drawn), store.schema.dim), np.float32)
    found = 0
    for start, stop in ranges:
        rows_N, embedding_ND = store.valid_rows(start, stop)
        first, last = np.searchsorted(drawn, (start, stop))
        here_ND = embedding_ND[np.isin(rows_N, drawn[first:last], assume_unique=True)]
        sample_ND[found : found + len(here_ND)] = here_ND
        found += len(here_ND)
    return sample_ND[:found]
