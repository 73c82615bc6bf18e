"""Clusters of similar sentences, and what they serve: to find repetitions, and to cap how many enter from each.

Shapes: C candidates, K clusters, N rows of a block, S sampled rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dimefm.store.embedding_store import Store

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
    texts: Store,
    rows_C: np.ndarray[Any, Any],
    *,
    seed: int,
    device: str,
    progress: Callable[[int], None] = lambda rows: None,
) -> np.ndarray[Any, Any]:
    """The cluster of each of these rows, int32 (C,), by ten rounds of spherical k-means over a random sample of them.

    SemDeDup does the same (Abbas et al. 2023, arXiv 2303.09540). Rows are read in the order in which they are given.
    """
    count = cluster_count(len(rows_C))
    sample = min(len(rows_C), max(count, min(_SAMPLE, count * _SAMPLE_PER_CLUSTER)))
    chosen = np.sort(np.random.default_rng((seed, 2)).choice(len(rows_C), sample, replace=False))
    centre_KD = _spherical_kmeans(torch.from_numpy(texts.gather(rows_C[chosen])), count, seed=seed, device=device)
    label_C = np.empty(len(rows_C), np.int32)
    for at in range(0, len(rows_C), _BLOCK):
        half_ND = torch.from_numpy(texts.gather(rows_C[at : at + _BLOCK]))
        label_C[at : at + _BLOCK] = _nearest(half_ND, centre_KD)[0].numpy()
        progress(min(at + _BLOCK, len(rows_C)))
    return label_C


def _spherical_kmeans(half_SD: torch.Tensor, count: int, *, seed: int, device: str) -> torch.Tensor:
    """Centres of unit norm, float32 (K, D) on `device`. A cluster that lost all its rows starts anew at the row that is
    furthest from its centre. The CPU makes the sums, because there their order is fixed."""
    first = np.sort(np.random.default_rng((seed, 3)).choice(len(half_SD), count, replace=False))
    centre_KD = F.normalize(half_SD[torch.from_numpy(first)].float(), dim=1)
    device_SD = half_SD.to(device)
    for _ in range(_ROUNDS):
        label_S, similarity_S = _nearest(device_SD, centre_KD.to(device))
        sum_KD = torch.zeros_like(centre_KD)
        for at in range(0, len(half_SD), _BLOCK):
            sum_KD.index_add_(0, label_S[at : at + _BLOCK], half_SD[at : at + _BLOCK].float())
        empty = torch.bincount(label_S, minlength=count) == 0
        furthest = torch.argsort(similarity_S, stable=True)[: int(empty.sum())]
        sum_KD[empty] = half_SD[furthest].float()
        centre_KD = F.normalize(sum_KD, dim=1)
    return centre_KD.to(device)


def _nearest(half_ND: torch.Tensor, centre_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of each row, int64 (N,), and the similarity to it, float32 (N,); both on the CPU."""
    parts = half_ND.to(centre_KD.device).split(max(1, _SIMILARITIES // len(centre_KD)))
    best = [(part_ND.float() @ centre_KD.T).max(dim=1) for part_ND in parts]
    return torch.cat([found.indices for found in best]).cpu(), torch.cat([found.values for found in best]).cpu()


def repetitions(
    texts: Store,
    rows_C: np.ndarray[Any, Any],
    label_C: np.ndarray[Any, Any],
    limit: float,
    *,
    device: str,
    progress: Callable[[int], None] = lambda rows: None,
) -> np.ndarray[Any, Any]:
    """For each candidate, given best first, the row that it repeats: int32 (C,), -1 where it repeats none.

    A candidate repeats a better one of its cluster that repeats none itself, if their cosine is `limit` or more. Within
    a cluster this is exact; two alike that fell into different clusters are not found.
    """
    like_C = np.full(len(rows_C), -1, np.int32)
    order = np.argsort(label_C, kind="stable")
    ends = np.cumsum(np.bincount(label_C))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        members = order[start:end]
        if len(members) > 1:
            like_C[members] = _repetitions_in_cluster(texts, rows_C[members], limit, device)
        progress(int(end))
    return like_C


def _repetitions_in_cluster(
    texts: Store, rows_N: np.ndarray[Any, Any], limit: float, device: str
) -> np.ndarray[Any, Any]:
    """`repetitions` for the candidates of one cluster, best first, int32 (N,).

    Each block is compared with the kept candidates of all blocks before it, then with itself.
    """

    def unit_vectors(rows: np.ndarray[Any, Any]) -> torch.Tensor:
        return F.normalize(torch.from_numpy(texts.gather(rows)).to(device).float(), dim=1)

    like_N = np.full(len(rows_N), -1, np.int32)
    kept: list[np.ndarray[Any, Any]] = []
    for at in range(0, len(rows_N), _BLOCK):
        block = rows_N[at : at + _BLOCK]
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
