"""Scores of images: how near each is to the middle of its cluster, and to what a user asked about.

Shapes: T images of the store, N images of a shard, K clusters, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cache_schemas import Status
from dimefm.errors import RUN_AGAIN, StoreError
from dimefm.selection.clusters import cluster_count, find_centres
from dimefm.selection.grounding import draw_rows
from dimefm.selection.scores import score_rows
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.checked_file import read_checked, write_checked
from dimefm.system.shard_work import ShardRunner

VECTORS = "vectors"
_NEAREST = 16
_COSINES = 1 << 24  # in a block: 64 MiB
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NearestVector:
    """The mean of the `top` largest cosines of an image with the vectors that `keep_vectors` has put into `folder`; of
    all where there are fewer."""

    folder: str
    top: int = 1

    def load(self, width: int, device: str) -> Callable[[_Array], _Array]:
        """The scores of images of this width."""
        data = read_checked(storage.join(self.folder, VECTORS))
        if data is None:
            raise StoreError(f"{self.folder}/{VECTORS} is damaged", remedy=RUN_AGAIN)
        vector_KD = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, width)).to(device)

        def scores(embedding_ND: _Array) -> _Array:
            value_ND = torch.from_numpy(embedding_ND)
            unit_ND = F.normalize(value_ND.to(device).float(), dim=1)
            top = min(self.top, len(vector_KD))
            parts = unit_ND.split(max(1, _COSINES // len(vector_KD)))
            best = [(part_ND @ vector_KD.T).topk(top, dim=1).values.mean(dim=1) for part_ND in parts]
            return torch.cat(best or [unit_ND.new_empty(0)]).cpu().numpy()

        return scores


def keep_vectors(folder: str, vectors: Callable[[], _Array]) -> None:
    """Put vectors, (Q, D) of unit length, into `folder`, unless they are there and undamaged: then they are not asked
    for. Raises StoreError where they cannot be written."""
    path = storage.join(folder, VECTORS)
    if read_checked(path) is None:
        write_checked(path, vectors().astype("<f4").tobytes())


def score_by_vectors(store: Store, folder: str, *, device: str, run: ShardRunner, top: int = 1) -> _Array:
    """The mean of the `top` largest cosines of each image with the vectors in `folder`: float32 (T,), NaN without an
    embedding."""
    return score_rows(store, folder, NearestVector(folder, top), device=device, prepare=lambda: None, run=run)


def closeness(
    store: Store, folder: str, targets: Store, count: int, *, seed: int, device: str, run: ShardRunner
) -> _Array:
    """The mean cosine of each image with the 16 nearest of up to `count` random `targets`, as `score_by_vectors` gives
    it."""

    def sample() -> _Array:
        found: _Array = F.normalize(draw_rows(targets, count, (seed, 0)), dim=1).numpy()
        return found

    keep_vectors(folder, sample)
    return score_by_vectors(store, folder, device=device, run=run, top=_NEAREST)


def centrality(store: Store, folder: str, *, seed: int, device: str, run: ShardRunner) -> _Array:
    """The cosine of each image with the nearest of as many centres as there would be clusters, as `score_by_vectors`
    gives it. Of images that are alike the one in the middle of them has the largest."""

    def centres() -> _Array:
        rows_C = np.flatnonzero(store.status() == Status.OK)
        return find_centres(store, rows_C, cluster_count(len(rows_C)), seed=seed, device=device).cpu().numpy()

    keep_vectors(folder, centres)
    return score_by_vectors(store, folder, device=device, run=run)
