"""The hits of every sentence: how many images have it among their top k. Counted once all pairs are written.

Memory is that of the counts and of one shard of pairs. Shapes: N image rows of a shard, K sentences per image, T
sentences.
"""

from __future__ import annotations

import numpy as np

from cache_schemas import HitCounts, digest_of
from cache_schemas.pairs import HITS, HITS_COMMIT
from dimefm.store.pairs_store import Pairs
from dimefm.store.zarr_arrays import digest_arrays
from dimefm.system import storage
from dimefm.system.lease import require_held


def count_hits(pairs: Pairs) -> HitCounts:
    """Count and write the hits, and then the document that says that the pairs are finished."""
    schema = pairs.schema
    hits_T = np.zeros(schema.text_rows, np.uint32)
    images, total, found = 0, 0.0, 0
    for shard in range(schema.shards):
        row_NK = pairs.text_rows(*schema.shard_range(shard))
        rows = row_NK[row_NK >= 0]
        np.add.at(hits_T, rows, np.uint32(1))
        images += int((row_NK[:, 0] >= 0).sum())
        found += len(rows)
        total += float(np.nansum(pairs.scores(*schema.shard_range(shard)), dtype=np.float64))
    with storage.writing_to(pairs.path):
        storage.remove_folder(storage.join(pairs.path, f"{HITS}/c"))  # zarr would read what a stopped run left
        pairs.group[HITS][:] = hits_T
        storage.flush_tree(storage.join(pairs.path, HITS))
    made_from = pairs.images_data()
    counted = HitCounts(
        images=images,
        skipped=schema.rows - images,
        selected=int(np.count_nonzero(hits_T)),
        text_rows=schema.text_rows,
        mean_score=round(total / max(1, found), 6),
        digest=digest_arrays(hits_T),
        images_data=None if None in made_from.values() else digest_of(made_from),
    )
    with storage.writing_to(pairs.path):
        require_held(pairs.path)
        storage.write_json(storage.join(pairs.path, HITS_COMMIT), counted.to_json())
    return counted
