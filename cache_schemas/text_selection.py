"""TEXTS.selection/: the visually grounded part of a text store, chosen by the images of an image store.

TEXTS.selection/
  plan.json            a SelectionPlan, written first: a command that goes on must have the same plan
  scores/<shard>       by similarity: float32 (rows of the shard of the text store,), NaN without an embedding; then
                       the crc32c of those bytes, uint32; little-endian
  grounding            while scores are computed: the sample of images that they compare with
  clusters/            while a selection is de-duplicated or balanced: its candidates by cluster
  rows.parquet         the kept sentences by row, SELECTED_ROWS
  sentences.txt        the same sentences, one per line
  report.md            what was kept and what was not, for people
  selection.json       a TextSelection, written last
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from cache_schemas.document import Document
from cache_schemas.problems import Problem

Ranking = Literal["hits", "similarity", "random"]

PLAN_FILE, SELECTION_FILE = "plan.json", "selection.json"
ROWS_FILE, SENTENCES_FILE, REPORT_FILE = "rows.parquet", "sentences.txt", "report.md"
SCORES, GROUNDING, CLUSTERS = "scores", "grounding", "clusters"

SELECTED_ROWS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("score", pa.float32()),  # by similarity that score; else the best of its pairs, null without one
        pa.field("hits", pa.uint32(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """How sentences are chosen. None: the condition does not apply. `among` is the digest of the rows that alone
    could be chosen, `without` that of leaks that could not; `seed` is that of the random draw, of the samples that
    scores are made from, and of the clusters."""

    by: Ranking
    among: str | None
    min_hits: int | None
    min_score: float | None
    pool: int | None
    dedup: float | None
    balance: bool
    size: int | None
    images_sample: int | None
    seed: int
    without: str | None = None


@dataclass(frozen=True, kw_only=True)
class SelectionPlan(Document):
    """What a selection is made from, and how. `images_data` and `texts_data` are the digests of the embeddings that the
    pairs were retrieved from; None if the pairs do not say it."""

    SCHEMA: ClassVar[str] = "dimefm.text_selection.plan"

    images: str
    images_identity: str
    texts: str
    texts_identity: str
    pairs: str
    pairs_digest: str
    settings: SelectionSettings
    images_data: str | None = None
    texts_data: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """How many sentences the store has from one source file, and how many of them were kept."""

    file: str
    rows: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Sentences by their rank value: bin i has edges[i] <= value < edges[i + 1], the last bin its upper edge too."""

    of: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]

    def problems(self, path: str) -> list[Problem]:
        """Problems where lengths do not fit each other."""
        bins = len(self.edges) - 1
        names = ("kept", "dropped")
        found = [(f"{path}.{n}", len(getattr(self, n))) for n in names if len(getattr(self, n)) != bins]
        return [Problem(where, f"expected {bins} bins, found {count}") for where, count in found]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sentence, as an example of a group; `like` is the better sentence that it repeats."""

    group: str
    row: int
    score: float | None
    hits: int
    file: str
    text: str
    like: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextSelection(Document):
    """A finished selection. `dropped` counts sentences by the first reason for which they were left out, in the order
    in which the reasons apply. `digest` is the sha256 of rows.parquet; `cap` is the most sentences per cluster, if
    balanced.
    """

    SCHEMA: ClassVar[str] = "dimefm.text_selection"

    plan: SelectionPlan
    rows: int
    kept: int
    dropped: dict[str, int]
    clusters: int | None
    cap: int | None
    sources: tuple[SourceShare, ...]
    histogram: Histogram | None
    examples: tuple[Example, ...]
    digest: str

    def problems(self) -> list[Problem]:
        found = self.histogram.problems("histogram") if self.histogram else []
        total = self.kept + sum(self.dropped.values())
        if total != self.rows:
            found.append(Problem("dropped", f"with those kept adds up to {total:,} sentences, not to {self.rows:,}"))
        return found
