"""The work of `retrieve`: find the sentences of the images of a few shards, and write and commit each of these.

Shapes: N image rows, D width, K sentences per image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import PairsStore, Status
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system.shard_work import Seat

if TYPE_CHECKING:
    from dimefm.retrieval.exact_search import Search

_LEAST, _MOST, _BATCHES = 1024, 65536, 64
"""Images that are searched at once: an index is slow with fewer than the first, and exact search reads all sentences
for each batch; but there are about so many batches, for as many workers, where there are images enough."""


@dataclass(frozen=True)
class Batch:
    """Neighbouring shards that are searched at once. `pending` are those to write, each with the digest of its images.

    The others are searched as well: with other queries beside it, a score may come out otherwise in its last bit, and a
    run that goes on must write the same bytes.
    """

    shards: range
    pending: dict[int, str] = field(hash=False)


def batches(schema: PairsStore, pending: dict[int, str]) -> list[Batch]:
    """The batches in which there are pending shards, each with the digest of its images. How shards are put together
    depends on the images alone."""
    size = -(-min(max(_LEAST, schema.rows // _BATCHES), _MOST) // schema.shard_rows)
    found = []
    for first in range(0, schema.shards, size):
        shards = range(first, min(first + size, schema.shards))
        if mine := {shard: pending[shard] for shard in shards if shard in pending}:
            found.append(Batch(shards, mine))
    return found


@dataclass(frozen=True)
class RetrieveShards:
    """A `system.shard_work.ShardWork`: `open_search` opens the search over the text store once per worker."""

    pairs: Pairs
    images: Store
    open_search: Callable[[Seat], Search]

    def open(self, seat: Seat) -> Callable[[Batch], None]:
        """Open the search."""
        return partial(_retrieve, self.pairs, self.images, self.open_search(seat))

    def name(self, unit: Batch) -> str:
        """The shards in messages."""
        first, last = unit.shards[0], unit.shards[-1]
        return f"shard {first}" if first == last else f"shards {first} to {last}"


def _retrieve(pairs: Pairs, images: Store, search: Search, batch: Batch) -> None:
    """Find the sentences of a batch of shards, and write those that are pending, one after the other."""
    began = time.monotonic()
    start, stop = pairs.schema.shard_range(batch.shards[0])[0], pairs.schema.shard_range(batch.shards[-1])[1]
    # All of the images is read before anything is written: an error of reading must not be taken for one of writing.
    usable_N, embedding_ND = images.valid_rows(start, stop)
    row_NK, score_NK = _nearest(search, usable_N - start, embedding_ND, (stop - start, pairs.schema.top_k))
    status_N = images.status(start, stop)
    unusable_N = status_N == Status.OK
    unusable_N[usable_N - start] = False
    status_N[unusable_N] = Status.NOT_FINITE
    seconds = (time.monotonic() - began) / len(batch.pending)
    for shard, digest in batch.pending.items():
        first, last = pairs.schema.shard_range(shard)
        rows = slice(first - start, last - start)
        pairs.write_shard(
            shard, images, status_N[rows], row_NK[rows], score_NK[rows],
            device=search.device, seconds=seconds, digest=digest,
        )  # fmt: skip


def _nearest(
    search: Search, places: np.ndarray[Any, Any], embedding_ND: np.ndarray[Any, Any], shape: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sentences int32 and scores float16, both (N, K), of images whose rows at `places` have embeddings; where there is
    no sentence -1 and NaN."""
    row_NK, score_NK = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float16)
    for at in range(0, len(places), search.batch):
        part = slice(at, at + search.batch)
        scores, rows = search.search(embedding_ND[part], shape[1])
        row_NK[places[part]], score_NK[places[part]] = rows, np.where(rows >= 0, scores, np.nan)
    return row_NK, score_NK
