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
from dimefm.selection.clusters import cluster_count, find_centres
from dimefm.selection.grounding import draw_rows
from dimefm.selection.scores import score_rows
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.shard_work import ShardRunner

VECTORS = "vectors"
_NEAREST = 16
_COSINES = 1 << 24  # in a block: 64 MiB
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NearestVector:
    """The mean of the `top` largest cosines of an image with the vectors, of unit length, in the file VECTORS of
    `folder`; of all where there are fewer."""

    folder: str
    top: int = 1

    def load(self, width: int, device: str) -> Callable[[_Array], _Array]:
        """The scores of images of this width."""
        data = storage.read_bytes(storage.join(self.folder, VECTORS))
        vector_KD = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, width)).to(device)

        def scores(embedding_ND: _Array) -> _Array:
            value_ND = torch.from_numpy(embedding_ND)
            unit_ND = F.normalize(value_ND.to(device).float(), dim=1)
            top = min(self.top, len(vector_KD))
            parts = unit_ND.split(max(1, _COSINES // len(vector_KD)))
            best = [(part_ND @ vector_KD.T).topk(top, dim=1).values.mean(dim=1) for part_ND in parts]
            return torch.cat(best or [unit_ND.new_empty(0)]).cpu().numpy()

        return scores


def score_by_vectors(
    store: Store, folder: str, vectors: Callable[[], _Array], *, device: str, run: ShardRunner, top: int = 1
) -> _Array:
    """The mean of the `top` largest cosines of each image with `vectors`, (Q, D) of unit length; they are asked for
    where scores are missing. float32 (T,), NaN without an embedding."""

    def prepare() -> None:
        if not storage.exists(storage.join(folder, VECTORS)):
            with storage.writing_to(folder):
                storage.write_atomic(storage.join(folder, VECTORS), vectors().astype("<f4").tobytes())

    return score_rows(store, folder, NearestVector(folder, top), device=device, prepare=prepare, run=run)


def closeness(
    store: Store, folder: str, targets: Store, count: int, *, seed: int, device: str, run: ShardRunner
) -> _Array:
    """The mean cosine of each image with the 16 nearest of up to `count` random `targets`, as `score_by_vectors` gives
    it."""

    def sample() -> _Array:
        found: _Array = F.normalize(draw_rows(targets, count, (seed, 0)), dim=1).numpy()
        return found

    return score_by_vectors(store, folder, sample, device=device, run=run, top=_NEAREST)


def centrality(store: Store, folder: str, *, seed: int, device: str, run: ShardRunner) -> _Array:
    """The cosine of each image with the nearest of as many centres as there would be clusters, as `score_by_vectors`
    gives it. Of images that are alike the one in the middle of them has the largest."""

    def centres() -> _Array:
        rows_C = np.flatnonzero(store.status() == Status.OK)
        return find_centres(store, rows_C, cluster_count(len(rows_C)), seed=seed, device=device).cpu().numpy()

    return score_by_vectors(store, folder, centres, device=device, run=run)
