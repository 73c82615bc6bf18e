"""Rows that repeat a better one: found by comparing the candidates of each cluster with one another.

Some clusters together are a unit of the work. Shapes: C candidates, K clusters, N members of a cluster, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dimefm.selection.clusters import cluster_count
from dimefm.selection.members import Members, MembersOfClusters
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here

REPEATED = "repeated"
_BLOCK = 2048
_UNIT = 1 << 17  # members of the clusters that are compared at a time: with 768 dimensions 200 MB of float16


def repetitions(
    store: Store,
    order_C: np.ndarray[Any, Any],
    label_C: np.ndarray[Any, Any],
    folder: str,
    limit: float,
    *,
    device: str,
    run: ShardRunner = run_here,
) -> np.ndarray[Any, Any]:
    """For each candidate, given best first, the row that it repeats: int32 (C,), -1 where it repeats none.

    A candidate repeats a better one of its cluster that repeats none itself, if their cosine is `limit` or more. Within
    a cluster this is exact; two alike that fell into different clusters are not found. `folder` has the members with
    their embeddings, by `clusters.cluster`; what was found in finished clusters is kept there too.
    """
    counts_K = np.bincount(label_C, minlength=cluster_count(len(order_C)))
    shards = tuple(np.unique(order_C // store.schema.shard_rows).tolist())
    units = _units(counts_K)
    pending = [unit for unit in units if not storage.exists(_path(folder, unit))]
    work = Comparing(store.path, folder, shards, len(counts_K), limit, device)
    done = len(label_C) - sum(int(counts_K[first:last].sum()) for first, last in pending)
    with Progress("comparing", len(label_C), store.schema.kind, done) as progress:
        for (first, last), _ in run(work, pending, progress.note):
            done += int(counts_K[first:last].sum())
            progress.at(done)
    like_C = np.full(len(label_C), -1, np.int32)
    for unit in units:
        rank, like = np.frombuffer(storage.read_bytes(_path(folder, unit)), "<i4").reshape(2, -1)
        like_C[rank] = order_C[like]
    return like_C


def _units(counts_K: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """The first cluster and the one after the last of each unit."""
    ends, units, first = np.cumsum(counts_K), list[tuple[int, int]](), 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _UNIT, side="right")))
        units.append((first, last))
        first = last
    return units


def _path(folder: str, unit: tuple[int, int]) -> str:
    return storage.join(folder, f"{REPEATED}/{unit[0]:06d}-{unit[1]:06d}")


@dataclass(frozen=True)
class Comparing:
    """Work of `repetitions` on the clusters first..last-1: writes the ranks of the members that repeat another, and of
    those that they repeat, int32 (2, R)."""

    store: str
    folder: str
    shards: tuple[int, ...]
    clusters: int
    limit: float
    device: str

    def open(self, seat: Seat) -> Callable[[tuple[int, int]], None]:
        if seat.threads is not None:
            torch.set_num_threads(seat.threads)
        device = seat.device or self.device
        members = MembersOfClusters(self.folder, self.shards, self.clusters, Store(self.store))

        def do(unit: tuple[int, int]) -> None:
            found = members.read(*unit)
            starts = np.searchsorted(found.label_N, np.arange(*unit))
            ranks, likes = [found.rank_N[:0]], [found.rank_N[:0]]
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(found.label_N)], strict=True):
                rank_N = found.rank_N[start:stop]
                like_N = repeated(found, start, stop, self.limit, device)
                ranks.append(rank_N[like_N >= 0])
                likes.append(rank_N[like_N[like_N >= 0]])
            data = np.concatenate([*ranks, *likes]).astype("<i4").tobytes()
            storage.write_atomic(_path(self.folder, unit), data)

        return do

    def name(self, unit: tuple[int, int]) -> str:
        return f"clusters {unit[0]} to {unit[1] - 1}"


def repeated(members: Members, start: int, stop: int, limit: float, device: str) -> np.ndarray[Any, Any]:
    """For each member of a cluster, which are those from `start` to `stop`, which of them it repeats, counted from
    `start`: int32 (N,), -1 where it repeats none.

    Each block is compared with the kept candidates of all blocks before it, then with itself.
    """

    def unit_vectors(places: np.ndarray[Any, Any]) -> torch.Tensor:
        return F.normalize(torch.from_numpy(members.embeddings(start + places)).to(device).float(), dim=1)

    count = stop - start
    like_N = np.full(count, -1, np.int32)
    kept: list[np.ndarray[Any, Any]] = []
    for at in range(0, count if count > 1 else 0, _BLOCK):
        block = np.arange(at, min(at + _BLOCK, count))
        block_ND, like = unit_vectors(block), like_N[at : at + _BLOCK]
        for earlier in kept:
            similarity_N, place_N = (block_ND @ unit_vectors(earlier).T).max(dim=1)
            near = (similarity_N >= limit).cpu().numpy() & (like < 0)
            like[near] = earlier[place_N.cpu().numpy()[near]]
        near_NN = torch.tril(block_ND @ block_ND.T >= limit, diagonal=-1).cpu().numpy()
        for i in np.flatnonzero(near_NN.any(axis=1) & (like < 0)):
            better = np.flatnonzero(near_NN[i, :i] & (like[:i] < 0))
            if len(better):
                like[i] = block[better[0]]
        kept.append(block[like < 0])
        if len(kept) > 1 and len(kept[-2]) + len(kept[-1]) <= _BLOCK:  # fewer and fuller blocks to compare with
            kept[-2:] = [np.concatenate(kept[-2:])]
    return like_N
