"""Clusters of similar rows: which cluster each candidate is in, and how many may enter from each.

A shard of the store is a unit of the work. What it leaves is in the folder CLUSTERS of the selection until that is
finished, so that a stopped run goes on, and workers find what they need:

    ranks             int32 (T,): the rank of each row of the store, -1 where it is no candidate
    centres           float32 (K, D)
    members/<shard>   the candidates of a shard by cluster: see `selection.members`
    repeated/<first>  what `selection.repetitions` found in the clusters from `first` on

Shapes: T rows of the store, C candidates, K clusters, N rows of a shard or block, S sampled rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dimefm.selection.members import (
    CENTRES,
    RANKS,
    label_members,
    members_path,
    read_rows,
    require_room,
    write_members,
)
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here

_ROUNDS = 10
_SAMPLE_PER_CLUSTER = 64
_SAMPLE = 262_144  # rows or fewer: with 768 dimensions 400 MB of float16
_SIMILARITIES = 1 << 24  # in a block: 64 MiB
_BLOCK = 2048


def cluster_count(candidates: int) -> int:
    """The number of clusters for a number of candidates: its square root. Then finding the cluster of a candidate costs
    as much as comparing it with all candidates of that cluster."""
    return max(1, round(math.sqrt(candidates)))


def cluster(
    store: Store,
    order_C: np.ndarray[Any, Any],
    folder: str,
    *,
    seed: int,
    device: str,
    copies: bool = False,
    run: ShardRunner = run_here,
) -> np.ndarray[Any, Any]:
    """The cluster of each of these rows, given best first, int32 (C,), by ten rounds of spherical k-means over a random
    sample of them. SemDeDup does the same (Abbas et al. 2023, arXiv 2303.09540).

    What is in `folder` of an earlier run over the same rows is used. With `copies` it gets the embeddings too, in the
    order of their clusters, for `repetitions`. The store is read twice, from its beginning to its end.
    """
    count, schema = cluster_count(len(order_C)), store.schema
    _begin(folder, store, order_C)
    if not storage.exists(storage.join(folder, CENTRES)):
        centre_KD = find_centres(store, np.sort(order_C), count, seed=seed, device=device)
        with storage.writing_to(folder):
            storage.write_atomic(storage.join(folder, CENTRES), centre_KD.cpu().numpy().astype("<f4").tobytes())
    shards = np.unique(order_C // schema.shard_rows).tolist()
    pending = [shard for shard in shards if not storage.exists(members_path(folder, shard))]
    if copies:
        require_room(folder, len(order_C) * schema.dim * schema.item_bytes * len(pending) // len(shards))
    work = Labelling(store.path, folder, count, device, copies)
    with Progress("clustering", len(shards) * schema.shard_rows, schema.kind) as progress:
        done = len(shards) - len(pending)
        for _ in run(work, pending, progress.note):
            done += 1
            progress.at(done * schema.shard_rows)
    label_C = np.empty(len(order_C), np.int32)
    for shard in shards:
        rank_N, label_N = label_members(folder, shard, count)
        label_C[rank_N] = label_N
    return label_C


def _begin(folder: str, store: Store, order_C: np.ndarray[Any, Any]) -> None:
    """Write the ranks. Where others were written, all that was made by them is removed."""
    path, rank_T = storage.join(folder, RANKS), np.full(store.schema.rows, -1, "<i4")
    rank_T[order_C] = np.arange(len(order_C), dtype=np.int32)
    ranks = rank_T.tobytes()
    with storage.writing_to(folder):
        if storage.exists(path) and storage.read_bytes(path) == ranks:
            return
        storage.remove_folder(folder)
        storage.write_atomic(path, ranks)


@dataclass(frozen=True)
class Labelling:
    """Work of `cluster` on a shard of `store`: finds the cluster of each candidate, and writes the members
    of the shard."""

    store: str
    folder: str
    clusters: int
    device: str
    copies: bool

    def open(self, seat: Seat) -> Callable[[int], None]:
        if seat.threads is not None:
            torch.set_num_threads(seat.threads)
        store, centres = Store(self.store), storage.read_bytes(storage.join(self.folder, CENTRES))
        centre_KD = torch.from_numpy(np.frombuffer(centres, "<f4").astype(np.float32).reshape(self.clusters, -1))
        centre_KD = centre_KD.to(seat.device or self.device)

        def do(shard: int) -> None:
            start, stop = store.schema.shard_range(shard)
            ranks = storage.read_bytes(storage.join(self.folder, RANKS), 4 * start, 4 * (stop - start))
            rank_N = np.frombuffer(ranks, "<i4")
            rows_N = start + np.flatnonzero(rank_N >= 0)
            half_ND = read_rows(store, rows_N)
            label_N = _nearest(torch.from_numpy(half_ND), centre_KD)[0].numpy()
            vectors = half_ND if self.copies else None
            write_members(self.folder, shard, self.clusters, label_N, rank_N[rows_N - start], rows_N, vectors)

        return do

    def name(self, unit: int) -> str:
        return f"shard {unit}"


def find_centres(store: Store, rows_C: np.ndarray[Any, Any], count: int, *, seed: int, device: str) -> torch.Tensor:
    """Centres of unit norm, float32 (K, D), of ascending rows."""
    sample = min(len(rows_C), max(count, min(_SAMPLE, count * _SAMPLE_PER_CLUSTER)))
    chosen = np.sort(np.random.default_rng((seed, 2)).choice(len(rows_C), sample, replace=False))
    half_SD = torch.from_numpy(read_rows(store, rows_C[chosen]))
    half_SD = half_SD[half_SD.isfinite().all(dim=1) & half_SD.any(dim=1)]  # a status of OK says that of no embedding
    return spherical_kmeans(half_SD, min(count, len(half_SD)), seed=seed, device=device)


def spherical_kmeans(half_SD: torch.Tensor, count: int, *, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Centres of unit norm, float32 (K, D) on `device`. A cluster that lost all its rows starts anew at the row that is
    furthest from its centre. The CPU makes the sums, because there their order is fixed."""
    first = np.sort(np.random.default_rng((seed, 3)).choice(len(half_SD), count, replace=False))
    centre_KD = F.normalize(half_SD[torch.from_numpy(first)].float(), dim=1)
    device_SD = half_SD.to(device)
    with Progress("finding clusters", _ROUNDS, "round") as progress:
        for done in range(_ROUNDS):
            label_S, similarity_S = _nearest(device_SD, centre_KD.to(device))
            sum_KD = torch.zeros_like(centre_KD)
            for at in range(0, len(half_SD), _BLOCK):
                sum_KD.index_add_(0, label_S[at : at + _BLOCK], half_SD[at : at + _BLOCK].float())
            empty = torch.bincount(label_S, minlength=count) == 0
            furthest = torch.argsort(similarity_S, stable=True)[: int(empty.sum())]
            sum_KD[empty] = half_SD[furthest].float()
            centre_KD = F.normalize(sum_KD, dim=1)
            progress.at(done + 1)
    return centre_KD.to(device)


def _nearest(half_ND: torch.Tensor, centre_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of each row, int64 (N,), and the similarity to it, float32 (N,); both on the CPU."""
    parts = half_ND.to(centre_KD.device).split(max(1, _SIMILARITIES // len(centre_KD)))
    best = [(part_ND.float() @ centre_KD.T).max(dim=1) for part_ND in parts]
    return torch.cat([found.indices for found in best]).cpu(), torch.cat([found.values for found in best]).cpu()


def capped(label_C: np.ndarray[Any, Any], size: int) -> tuple[np.ndarray[Any, Any], int]:
    """Which of the candidates, given best first, enter if no cluster gives more than the cap: bool (C,), and the cap.

    The cap is the smallest at which `size` candidates enter, or all where there are fewer. If more than `size` would
    enter, then among those that a smaller cap would keep out, the best ones do. MetaCLIP balances captions by concept
    in this way (Xu et al. 2023, arXiv 2309.16671); clusters take the place of its words, the ranking that of its draw.
    """
    order = np.argsort(label_C, kind="stable")
    counts = np.bincount(label_C)
    place_C = np.empty(len(label_C), np.int64)
    place_C[order] = np.arange(len(label_C)) - np.repeat(np.cumsum(counts) - counts, counts)
    entered = np.cumsum(np.bincount(place_C))
    if entered[-1] <= size:
        return np.ones(len(label_C), bool), len(entered)
    cap = int(np.searchsorted(entered, size)) + 1
    inside_C = place_C < cap - 1
    last = np.flatnonzero(place_C == cap - 1)
    inside_C[last[: size - int(inside_C.sum())]] = True
    return inside_C, cap
