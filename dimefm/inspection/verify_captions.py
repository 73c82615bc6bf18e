"""What `dimefm verify` checks in a store of captions beside its embeddings: the pairs that say whose they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cache_schemas import SchemaError, Status
from cache_schemas.pairs import CAPTION_PAIRS, HITS_COMMIT, TEXT_ROW
from dimefm.errors import StoreError
from dimefm.inspection.verify_shard import in_one_line
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.zarr_arrays import digest_arrays
from dimefm.system import storage


def caption_pairs(store: Store) -> Pairs | None:
    """The pairs within a store of captions; None in any other store. Raises StoreError or SchemaError for damaged
    attributes."""
    path = storage.join(store.path, CAPTION_PAIRS)
    return Pairs(path) if storage.exists(storage.join(path, "zarr.json")) else None


def check_caption_pairs(store: Store, pairs: Pairs) -> Iterator[str]:
    """What is wrong with the pairs, each in a line: with their documents, with a shard, or with the counts of hits."""
    if pairs.schema.texts_identity != store.schema.identity or pairs.schema.text_rows != store.schema.rows:
        yield f"{pairs.path} is about the sentences of another store"
        return
    hits_T = np.zeros(store.schema.rows, np.uint32)
    whole = True
    for shard in range(pairs.schema.shards):
        try:
            problem = _check_shard(pairs, shard, hits_T)
        except (StoreError, SchemaError) as error:
            problem = in_one_line(error)
        if problem:
            whole = False
            yield f"{pairs.path}, shard {shard}: {problem}"
    if whole and storage.exists(storage.join(pairs.path, HITS_COMMIT)):
        try:
            if not np.array_equal(pairs.hits(), hits_T):
                yield f"{pairs.path}: its counts of hits are not those of its rows"
        except (StoreError, SchemaError) as error:
            yield in_one_line(error)


def _check_shard(pairs: Pairs, shard: int, hits_T: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> str | None:
    """What is wrong with a finished shard. The hits in it are added to `hits_T`."""
    commit = pairs.commit(shard)
    if commit is None:
        return None
    arrays = pairs.shard_arrays(shard)
    if digest_arrays(*arrays.values()) != commit.digest:
        return "its arrays are not those that were committed"
    row_NK = arrays[TEXT_ROW]
    rows = row_NK[row_NK >= 0]
    if row_NK.min(initial=-1) < -1 or rows.max(initial=-1) >= len(hits_T):
        return f"it names rows beyond the {len(hits_T):,} of the store"
    if len(row_NK) != sum(commit.counts.values()) or (row_NK[:, 0] >= 0).sum() > commit.counts.get(Status.OK.name, 0):
        return "it has captions of more images than its commit"
    np.add.at(hits_T, rows, np.uint32(1))
    return None
