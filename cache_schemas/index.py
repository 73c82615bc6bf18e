"""TEXTS.index/: a FAISS index and index.json, the sidecar that says what it holds and how well it searches.

TEXTS.index/
  index.json               the sidecar; written last, it names the index file
  index-<digest>.faiss     ids are rows of the store
  build/                   while the index is built or extended: trained.faiss, then one file per part; each has a
                           JSON document beside it, written after it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cache_schemas.document import Document
from cache_schemas.identity import TeacherIdentity
from cache_schemas.problems import Problem

SIDECAR_FILE, BUILD = "index.json", "build"


@dataclass(frozen=True, kw_only=True)
class TriedSearch:
    """Search parameters that were tried: the lists probed (0: there are no lists), how many times k candidates are
    scored again, the recall, and the queries per second of one run."""

    probes: int
    rescore: int
    value: float
    queries_per_second: float


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the exact top `k` that the index finds, measured with `queries` held-out vectors of kind `source`, and
    the parameters that were tuned for queries of this kind; None in older sidecars, which tuned for the first alone.
    `tried` are all parameters that were measured on the way, none in older sidecars."""

    k: int
    queries: int
    source: str
    value: float
    search_parameters: dict[str, int] | None = None
    rescore: int | None = None
    queries_per_second: float | None = None
    tried: tuple[TriedSearch, ...] = ()


@dataclass(frozen=True, kw_only=True)
class IndexPart(Document):
    """A file below build/: the trained, empty index (no rows), or the rows of some shards of the store.

    `settings` is the digest of what decides the bytes of the file: store, factory, seed, training rows. `skipped` rows
    have no finite, non-zero embedding. Only the trained index has a `spread`, the one that the sidecar gets.
    """

    SCHEMA: ClassVar[str] = "dimefm.index_part"

    settings: str
    rows: int
    skipped: int
    bytes: int
    digest: str
    seconds: float
    spread: str = ""


@dataclass(frozen=True, kw_only=True)
class IndexSidecar(Document):
    """The sidecar of an index.

    `file` holds rows of the store with the identity `store_identity`: those of `shards`, each with the digest of its
    commit. `rescore` times k candidates are fetched and scored again with the store's embeddings (1: the index's own
    scores are taken). `spread` is the standard deviation of each list's rows about their mean, base64 of float16, by
    which the lists to probe are chosen; empty where FAISS chooses. `search_parameters`, `rescore` and
    `queries_per_second` are those of the first kind of `recall`; every kind was tuned to `recall_target`.
    """

    SCHEMA: ClassVar[str] = "dimefm.index"
    VERSION: ClassVar[int] = 2

    store: str
    store_identity: str
    kind: str
    shards: dict[str, str]
    rows: int
    skipped: int
    dim: int
    teacher: TeacherIdentity
    factory: str
    search_parameters: dict[str, int]
    rescore: int
    spread: str
    recall: tuple[Recall, ...]
    recall_target: float
    queries_per_second: float
    file: str
    bytes: int
    digest: str
    train_rows: int
    seconds: float
    seed: int
    versions: dict[str, str]

    def problems(self) -> list[Problem]:
        found = [
            Problem(f"recall[{i}].value", f"must lie in [0, 1], found {r.value}")
            for i, r in enumerate(self.recall)
            if not 0 <= r.value <= 1
        ]
        if "/" in self.file:
            found.append(Problem("file", f"must lie beside the sidecar, found {self.file}"))
        return found

    def search_of(self, kind: str) -> Recall:
        """How queries of `kind` are searched: as was tuned for them, or for the first kind where they were not."""
        own = next((recall for recall in self.recall if recall.source == kind), self.recall[0])
        if own.search_parameters is not None:
            return own
        return replace(
            own,
            search_parameters=self.search_parameters,
            rescore=self.rescore,
            queries_per_second=self.queries_per_second if own is self.recall[0] else None,
        )

    @property
    def bytes_per_vector(self) -> float:
        """Size of the index file divided by the number of its vectors."""
        return self.bytes / max(1, self.rows)
