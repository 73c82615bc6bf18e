"""LEAKS.selection/: the training images that are also test images, and, as a selection, all others; or the training
sentences that are also captions of test images.

LEAKS.selection/
  plan.json, rows.parquet, dropped.parquet, report.md, selection.json
                       of images: as of a selection of images, for train-student --image-selection
  features/            of images: the test images' embeddings by the teacher, a store for each set
  leaks.parquet        the pairs of a test image or caption and a training image or sentence, LEAKED
  leaks.json           a Leaks, written before selection.json
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pyarrow as pa

from cache_schemas.document import LATER, Document
from cache_schemas.problems import Problem

LEAKS_FILE, LEAKED_FILE = "leaks.json", "leaks.parquet"

LEAKED = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("test_row", pa.int64(), nullable=False),  # the image in the set
        pa.field("test_key", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # of the store
        pa.field("key", pa.string(), nullable=False),
        pa.field("cosine", pa.float32(), nullable=False),
        pa.field("similarity", pa.float32()),  # of pixels or words; null where an image cannot be read
        pa.field("leak", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LeakedSet:
    """A test set: of `tested` images, or captions, how many are trained on (`leaked`), how many pairs were looked at
    (`candidates`), and in how many of these an image could not be read. `title` names it in leaks.parquet, `digest` is
    that of its images and labels, by which results of evaluations name it. `unreadable` counts the test images that
    have no embedding, and so could not be looked for, by status: {"UNDECODABLE": 2}; None for captions, and in older
    files."""

    title: str
    suite: str
    digest: str
    tested: int
    leaked: int
    candidates: int
    unread: int
    unreadable: dict[str, int] | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class LookedFor:
    """What `leaks` was asked for: its options, as of Leaks, and the digest of each set by its title."""

    cosine: float
    similarity: float
    nearest: int
    sets: dict[str, str]

    def facts(self) -> dict[str, object]:
        """All of it by name, to be compared with another."""
        options = {name: getattr(self, name) for name in ("cosine", "similarity", "nearest")}
        return {**options, **{f"set {title}": digest for title, digest in self.sets.items()}}


@dataclass(frozen=True, kw_only=True)
class Leaks(Document):
    """What was found in a store of this `kind`. A pair is looked at from `cosine` on, of the `nearest` rows of each
    test image or caption; it is a leak from `similarity` on. `rows` of the store are in one or more. `asked` is the
    digest of the sets and of these three, `digest` the sha256 of leaks.parquet."""

    SCHEMA: ClassVar[str] = "dimefm.leaks"

    kind: Literal["image", "text"]
    store: str
    store_identity: str
    store_data: str
    asked: str
    cosine: float
    similarity: float
    nearest: int
    sets: tuple[LeakedSet, ...]
    rows: int
    digest: str

    @property
    def looked_for(self) -> LookedFor:
        """What was asked for."""
        sets = {one.title: one.digest for one in self.sets}
        return LookedFor(cosine=self.cosine, similarity=self.similarity, nearest=self.nearest, sets=sets)

    def problems(self) -> list[Problem]:
        """Problems that the types cannot express."""
        return [
            Problem("sets", f"{one.title} has {one.leaked} leaks and {lost} unreadable images of {one.tested}")
            for one in self.sets
            if one.leaked + (lost := sum((one.unreadable or {}).values())) > one.tested
        ]
