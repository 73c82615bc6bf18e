"""LEAKS.selection/: the training images that are also test images; and, as a selection, all others.

LEAKS.selection/
  plan.json, rows.parquet, dropped.parquet, report.md, selection.json
                       as of a selection of images: train-student --image-selection takes it
  features/            the test images' embeddings by the teacher, a store for each set
  leaks.parquet        the pairs of a test image and a training image, LEAKED
  leaks.json           a Leaks, written before selection.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from cache_schemas.document import Document
from cache_schemas.problems import Problem

LEAKS_FILE, LEAKED_FILE = "leaks.json", "leaks.parquet"

LEAKED = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("test_row", pa.int64(), nullable=False),  # of the set
        pa.field("test_key", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # of the image store
        pa.field("key", pa.string(), nullable=False),
        pa.field("cosine", pa.float32(), nullable=False),
        pa.field("similarity", pa.float32()),  # of their pixels; null where one of the two cannot be read
        pa.field("leak", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LeakedSet:
    """A test set: of `images` how many are among the training images (`leaked`), how many pairs were looked at
    (`candidates`), and in how many of these an image could not be read. `title` names it in leaks.parquet, `digest` is
    that of its images and labels, by which results of evaluations name it."""

    title: str
    suite: str
    digest: str
    images: int
    leaked: int
    candidates: int
    unread: int


@dataclass(frozen=True, kw_only=True)
class Leaks(Document):
    """What was found. A pair is looked at from `cosine` on, of the `nearest` training images of each test image; it is
    a leak from `similarity` on. `rows` training images are in one or more. `digest` is the sha256 of leaks.parquet."""

    SCHEMA: ClassVar[str] = "dimefm.leaks"

    images: str
    images_identity: str
    images_data: str
    cosine: float
    similarity: float
    nearest: int
    sets: tuple[LeakedSet, ...]
    rows: int
    digest: str

    def problems(self) -> list[Problem]:
        """Problems that the types cannot express."""
        return [
            Problem("sets", f"{one.title} has {one.leaked} leaks of {one.images} images")
            for one in self.sets
            if one.leaked > one.images
        ]
