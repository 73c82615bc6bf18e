"""TEXTS.index/: a FAISS index and index.json, the sidecar that says what it holds and how well it searches.

TEXTS.index/
  index.json               the sidecar; written last, it names the index file
  index-<digest>.faiss     ids are rows of the store
  build/                   while the index is built or extended: trained.faiss, then one file per part; each has a
                           JSON document beside it, written after it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_schemas.document import Document
from cache_schemas.identity import TeacherIdentity
from cache_schemas.problems import Problem

SIDECAR_FILE, BUILD = "index.json", "build"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the exact top `k` that the index finds, measured with `queries` held-out vectors of kind `source`."""

    k: int
    queries: int
    source: str
    value: float


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
    which the lists to probe are chosen; empty where FAISS chooses. The search parameters were tuned to `recall_target`
    with the first kind of `recall`.
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

    @property
    def bytes_per_vector(self) -> float:
        """Size of the index file divided by the number of its vectors."""
        return self.bytes / max(1, self.rows)
