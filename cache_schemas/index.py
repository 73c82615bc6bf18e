"""TEXTS.index/: a FAISS index beside index.json, the sidecar that says what it holds and how well it searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache_schemas.document import Document
from cache_schemas.identity import TeacherIdentity
from cache_schemas.problems import Problem

INDEX_FILE, SIDECAR_FILE = "index.faiss", "index.json"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the exact top `k` that the index finds, over `queries` held-out vectors of kind `source`."""

    k: int
    queries: int
    source: str
    value: float


@dataclass(frozen=True, kw_only=True)
class IndexSidecar(Document):
    """The sidecar. Ids in the index are rows of the store with digest `store_identity`. `rescore` is how many
    times k candidates are fetched and re-scored exactly from the store (1: the index's own scores are exact)."""

    SCHEMA: ClassVar[str] = "dimefm.index"

    store: str
    store_identity: str
    kind: str
    rows: int
    skipped: int
    dim: int
    teacher: TeacherIdentity
    factory: str
    search_parameters: dict[str, int]
    rescore: int
    recall: tuple[Recall, ...]
    recall_target: float
    bytes: int
    digest: str
    train_rows: int
    seconds: float
    seed: int
    versions: dict[str, str]

    def problems(self) -> list[Problem]:
        return [
            Problem(f"recall[{i}].value", f"must lie in [0, 1], found {r.value}")
            for i, r in enumerate(self.recall)
            if not 0 <= r.value <= 1
        ]

    @property
    def bytes_per_vector(self) -> float:
        """Size of the index file over its vectors."""
        return self.bytes / max(1, self.rows)
