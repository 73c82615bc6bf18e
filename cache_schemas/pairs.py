"""PAIRS.zarr: for each image row, its top-k sentences; for each sentence, how many images retrieved it.

CAPTIONS.zarr, the store of the captions of images, has pairs of the same form in it, in pairs/: there the sentences of
an image are its own, and k is the most that an image has.

PAIRS.zarr/
  zarr.json            attributes: a PairsStore document under the key "dimefm"
  text_row/            int32 (image rows, k): rows of the text store, best first; -1 where the image has none
  score/               float16 (image rows, k): cosine similarity, unscaled; NaN where text_row is -1
  hits/                uint32 (text rows,): number of images that have this sentence among their top k
  commits/<shard>.json one per shard of text_row and score; and hits.json, HitCounts, written when hits/ is complete
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache_schemas.document import Document
from cache_schemas.problems import Problem

TEXT_ROW, SCORE, HITS = "text_row", "score", "hits"
HITS_COMMIT = "commits/hits.json"
CAPTION_PAIRS = "pairs"
"""Where, within a store of captions, the pairs are that say whose they are."""


@dataclass(frozen=True, kw_only=True)
class PairsStore(Document):
    """The attributes of a pseudo-text store. `index` is where the index was, or "exact search"; `texts_data` is the
    digest of the embeddings that were searched, None in older stores. The digests of the images are in the commits.
    Pairs of the `kind` captions were not searched for: they are as the source has them, and `index` says "captions"."""

    SCHEMA: ClassVar[str] = "dimefm.pairs"

    images: str
    images_identity: str
    texts: str
    texts_identity: str
    index: str
    index_digest: str
    top_k: int
    rows: int
    text_rows: int
    shard_rows: int
    texts_data: str | None = None
    kind: Literal["retrieved", "captions"] = "retrieved"

    def problems(self) -> list[Problem]:
        fields = ("top_k", "rows", "text_rows", "shard_rows")
        return [Problem(f, f"must be at least 1, found {getattr(self, f)}") for f in fields if getattr(self, f) < 1]

    @property
    def shards(self) -> int:
        """Number of shards over the image rows."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First image row of `shard`, and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)


@dataclass(frozen=True, kw_only=True)
class HitCounts(Document):
    """commits/hits.json: how many sentences are visually grounded, that is, retrieved for at least one image.

    `selected` sentences of `text_rows` are; `skipped` images have no usable embedding, or no caption; `mean_score` is
    over all retrieved sentences; `digest` is that of the array hits/. `images_data` is the digest of the embeddings of
    all images, None where it was not kept for each shard.
    """

    SCHEMA: ClassVar[str] = "dimefm.selection"

    images: int
    skipped: int
    selected: int
    text_rows: int
    mean_score: float
    digest: str
    images_data: str | None = None
