"""IMAGES.selection/: the images of an image store that are worth training on, or that stand in no test set.

IMAGES.selection/
  plan.json            an ImageSelectionPlan, written first: a command that goes on must have the same plan
  scores/, unwanted/   scores of the rows, a file for each shard of the store (selection.scores)
  clusters/            while the selection is made: its candidates by cluster
  rows.parquet         the kept images by row, SELECTED_IMAGES
  dropped.parquet      the images that repeat another: COPIES
  report.md            what was kept and what was not, for people
  selection.json       an ImageSelection, written last
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pyarrow as pa

from cache_schemas.document import LATER, Document
from cache_schemas.leaks import LookedFor
from cache_schemas.problems import Problem
from cache_schemas.text_selection import Histogram, SourceShare

ImageRanking = Literal["central", "distant", "near", "random"]
UNWANTED = "unwanted"
DROPPED_FILE = "dropped.parquet"

SELECTED_IMAGES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("score", pa.float32()),  # what ranks it; null at random
        pa.field("key", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
    ]
)
COPIES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("like", pa.int64(), nullable=False),  # the row that it repeats, which was kept
        pa.field("same_bytes", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ImageSelectionSettings:
    """How images are chosen. None: the condition does not apply. `near` is the identity of the store of targets, and
    `near_data` the digest of its embeddings. `drop_near` are queries in words, which the teacher of the store encodes;
    in older plans `drop_data` is the digest of what it gave, on one device. `exact`: of images with the same bytes one
    is kept."""

    by: ImageRanking
    near: str | None
    near_data: str | None
    near_sample: int | None
    drop_near: tuple[str, ...]
    drop_above: float | None
    exact: bool
    top: int | None
    dedup: float | None
    balance: bool
    size: int | None
    seed: int
    drop_data: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageSelectionPlan(Document):
    """What a selection is made from, and how. `images_data` is the digest of the embeddings. Without `settings` it is
    what `dimefm leaks` has left: all but the images that it found in test sets, and `leaks` is the digest of these
    sets and of what it looked for, which is `looked_for`; older plans have the digest alone."""

    SCHEMA: ClassVar[str] = "dimefm.image_selection.plan"

    images: str
    images_identity: str
    images_data: str
    settings: ImageSelectionSettings | None
    leaks: str | None = None
    looked_for: LookedFor | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class ImageSelection(Document):
    """A finished selection. `dropped` counts images by the first reason for which they were left out, in the order in
    which the reasons apply. `groups` says how many kept images stand for how many of the store: {"1": 900, "2": 50},
    with "11 or more" at the end. `digest` is the sha256 of rows.parquet, `copies_digest` that of dropped.parquet; `cap`
    is the most images per cluster, if balanced."""

    SCHEMA: ClassVar[str] = "dimefm.image_selection"

    plan: ImageSelectionPlan
    rows: int
    kept: int
    dropped: dict[str, int]
    groups: dict[str, int]
    clusters: int | None
    cap: int | None
    sources: tuple[SourceShare, ...]
    histogram: Histogram | None
    digest: str
    copies_digest: str

    def problems(self) -> list[Problem]:
        found = self.histogram.problems("histogram") if self.histogram else []
        total = self.kept + sum(self.dropped.values())
        if total != self.rows:
            found.append(Problem("dropped", f"with those kept adds up to {total:,} images, not to {self.rows:,}"))
        return found
