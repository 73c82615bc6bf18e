"""IMAGES.zarr and TEXTS.zarr: the layout of the files, the attributes of the group, the arrays, the status codes.

STORE.zarr/
  zarr.json              attributes: an EmbeddingStore document under the key "dimefm"
  embedding/             float16 (or float32) (rows, dim) or (rows, views, dim), unit norm, sharded, a crc32c on each
  status/                uint8 (rows,), a Status code per row
  view/                  with views: int32 (rows, views, numbers), enough of each view to replay it exactly (views.py)
  rows/<shard>.parquet   the plan, written before any work (plan.py); rows/files.parquet: the files it was made from
  commits/<shard>.json   written last, one per finished shard (commit.py); beside it the table of failures, if many
  pixels/<shard>.tar     with pixels: the images as small JPEGs, a WebDataset in the order of the rows
  pixel_index/           with pixels: int64 (rows, 3): where in the tar the JPEG of a row begins and ends, its crc32c
  views/<first>/         views that were added later: a store of its own, of the views from number `first` on, which has
                         neither plan nor pixels: those are of the store that it is in
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Literal

from cache_schemas.document import Document, digest_of
from cache_schemas.identity import TeacherIdentity
from cache_schemas.problems import Problem
from cache_schemas.views import ViewPlan

Kind = Literal["image", "text"]
CpuDecoder = Literal["fast", "pillow"]
Decoder = Literal[CpuDecoder, "nvjpeg"]

ATTRIBUTES_KEY = "dimefm"
EMBEDDING, STATUS, VIEW, PIXEL_INDEX = "embedding", "status", "view", "pixel_index"
ROWS, COMMITS, PIXELS, VIEWS = "rows", "commits", "pixels", "views"


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array of the store must look like. A shard has one chunk or more of whole rows; no compression."""

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int


class Status(IntEnum):
    """What became of a row. With any status but PENDING and OK the row has no embedding, but it keeps its place.

    Below each status stands what it means, and the functions that decide it. An image gets it as the `status` of a
    DecodeError (`images.decode.DecodeError`), which `caching.encode_rows.encode_rows` writes down with the reason.
    `caching.permanent_failures.require_permanent` refuses to commit a shard whose failures may be those of the storage.
    """

    PENDING = 0
    """Not done yet: the shard has no commit."""
    OK = 1
    """The row has an embedding: `caching.encode_rows.encode_rows`."""
    MISSING = 2
    """The file is gone, or with --accept-missing refused: `sources.read_image.read_image`. In an import, no image
    belongs to the row: `exchange.import_embeddings.import_embeddings`."""
    EMPTY = 3
    """The image has no bytes: `images.decode.open_image`."""
    TRUNCATED = 4
    """The file or archive ends before the image does: `sources.read_image.read_image`."""
    UNDECODABLE = 5
    """The bytes are not an image that is supported, or a broken one: `images.decode.open_image`,
    `images.decode.decode_fast`; or a cell of a table cannot be read: `sources.read_image.read_encoded`."""
    TOO_LARGE = 6
    """More pixels than the limit (`images.decode.open_image`), more bytes (`sources.read_image.read_encoded`) or more
    memory than there is (`caching.image_loader.or_reason`); or so long and thin that it cannot be resized
    (`images.preprocess.Preprocess`) or kept (`images.small_jpeg.small_jpeg`). Such are decompression bombs, scans and
    damaged headers."""
    NOT_FINITE = 7
    """The teacher gave NaN, infinity or a zero vector: `caching.encode_rows.encode_rows`; or the imported embedding is
    one: `exchange.import_embeddings.import_embeddings`."""
    CRASHED = 8
    """The decoder ends its process, or takes all memory, also when it decodes this image alone:
    `caching.crashing_images.without_crashes`."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Files, members, rows or lines of a source that are not used: why, how many, and one of them as an example."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What the rows were planned from. `digest` covers every file's path and size and the `settings` (column, length
    limits, seed of the order). `problems` are files that could not be read to their end; `skipped` is what was not
    used. `dropped` counts sentences in stores of older releases, which kept no examples.
    """

    arguments: tuple[str, ...]
    files: int
    bytes: int
    digest: str
    repeated_keys: int
    problems: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EmbeddingStore(Document):
    """The attributes of an embedding store. `digests` are the sha256, by path, of what is written once when the store
    is planned: every array's zarr.json, rows/files.parquet and the plans."""

    SCHEMA: ClassVar[str] = "dimefm.embedding-store"

    kind: Kind
    rows: int
    dim: int
    chunk_rows: int
    shard_rows: int
    batch_size: int
    teacher: TeacherIdentity
    source: SourceSummary
    views: ViewPlan | None = None
    pixels: int | None = None  # short side of the JPEGs in pixels/
    dtype: Literal["float16", "float32"] = "float16"
    decoder: Decoder = "fast"  # images.preprocess; nvjpeg: caching.gpu_image_loader
    digests: dict[str, str] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        fields = ("rows", "dim", "chunk_rows", "batch_size")
        found = [Problem(f, f"must be at least 1, found {getattr(self, f)}") for f in fields if getattr(self, f) < 1]
        if self.chunk_rows > 0 and (self.shard_rows < 1 or self.shard_rows % self.chunk_rows):
            found.append(Problem("shard_rows", f"must be a multiple of chunk_rows, found {self.shard_rows}"))
        if self.dim != self.teacher.embed_dim:
            found.append(Problem("dim", f"is {self.dim}, but teacher.embed_dim is {self.teacher.embed_dim}"))
        if self.views:
            found += [Problem(f"views.{one.path}", one.what) for one in self.views.problems()]
        if self.decoder == "nvjpeg" and (self.views or self.pixels):
            found.append(Problem("decoder", "nvjpeg goes with neither views nor pixels, which are made on the CPU"))
        if self.kind == "text" and not self.teacher.has_text:
            found.append(
                Problem("teacher.tokenizer", "is empty, as of a vision-only teacher, and the store holds texts")
            )
        for name in ("views", "pixels"):
            if self.kind == "text" and getattr(self, name) is not None:
                found.append(Problem(name, "is for images, and the store holds texts"))
        return found

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of this store, by name."""
        views = (self.views.count,) if self.views else ()
        found = {
            EMBEDDING: ArraySpec(shape=(self.rows, *views, self.dim), dtype=self.dtype, chunk_rows=self.chunk_rows),
            STATUS: ArraySpec(shape=(self.rows,), dtype="uint8", chunk_rows=self.shard_rows),
        }
        if self.views:
            numbers = (self.rows, *views, self.views.numbers)
            found[VIEW] = ArraySpec(shape=numbers, dtype="int32", chunk_rows=self.chunk_rows)
        if self.pixels:
            found[PIXEL_INDEX] = ArraySpec(shape=(self.rows, 3), dtype="int64", chunk_rows=self.chunk_rows)
        return found

    @property
    def item_bytes(self) -> int:
        """Bytes of each number of an embedding."""
        return int(self.dtype.removeprefix("float")) // 8

    @property
    def shard_bytes(self) -> int:
        """Bytes of all arrays of a full shard."""
        row = sum(math.prod(spec.shape[1:]) * int(spec.dtype.lstrip("floatuin")) for spec in self.arrays().values())
        return min(self.shard_rows, self.rows) * row // 8

    @property
    def shards(self) -> int:
        """Number of shards: the units of work, ceil(rows / shard_rows)."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of `shard`, and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    @property
    def identity(self) -> str:
        """Digest of teacher, source, plan, views and kind. An index or a run names a store by it."""
        facts = {"kind": self.kind, "teacher": self.teacher.compared(), "source": self.source.digest}
        plans = [self.digests.get(rows_path(shard)) for shard in range(self.shards)]
        # Views are drawn on the stored pixels where there are any; without views they change no embedding.
        return digest_of({**facts, "plans": plans, "views": self.views, "pixels": self.views and self.pixels})


def rows_path(shard: int) -> str:
    """Where, within a store, the plan of `shard` is."""
    return f"{ROWS}/{shard:06d}.parquet"


def pixels_path(shard: int) -> str:
    """Where, within a store, the JPEGs of `shard` are."""
    return f"{PIXELS}/{shard:06d}.tar"


def commit_path(shard: int) -> str:
    """Where, within a store, the commit of `shard` is."""
    return f"{COMMITS}/{shard:06d}.json"


def failures_path(shard: int) -> str:
    """Where, within a store, the table of a shard's failures is, if they are many."""
    return f"{COMMITS}/{shard:06d}.failures.parquet"


def views_path(first: int) -> str:
    """Where, within a store, the views are that were added from number `first` on."""
    return f"{VIEWS}/{first:06d}"
