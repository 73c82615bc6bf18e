"""Train many linear classifiers on frozen features at once. They see the same batches in the same order and differ only
in learning rate and weight decay, so that one matrix product serves them all.

This is ELEVATER's probe: batch normalisation without parameters, a linear layer that starts from the class embeddings,
SGD with momentum 0.9, batches of 64, a constant learning rate. The gradient is written by hand.

Shapes: N images, B images of a batch, K classifiers, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dimefm.evaluation.features import Features

BATCH, MOMENTUM = 64, 0.9
_BN_MOMENTUM, _BN_EPS = 0.1, 1e-5
_IN_MEMORY = 1 << 30  # bytes of features; more than that stay on disk and are read batch by batch
_BLOCK, _SCORES = 4096, 16 << 20  # the most images, and the most scores, that are computed at a time


class FeatureRows:
    """Some rows of a feature store: in memory if they take less than `limit` bytes, else on disk."""

    def __init__(self, features: Features, rows_N: np.ndarray[Any, Any], device: str, limit: int = _IN_MEMORY) -> None:
        self._features, self._rows_N, self._device = features, rows_N, device
        whole = len(rows_N) * features.store.schema.dim * 4 <= limit
        self._whole = torch.from_numpy(features.take(rows_N)).to(device) if whole else None

    def __len__(self) -> int:
        return len(self._rows_N)

    @property
    def home(self) -> torch.device:
        """The device on which `take` wants its places: that of the features, or the CPU if they are on disk."""
        return torch.device("cpu") if self._whole is None else self._whole.device

    def take(self, places_B: torch.Tensor) -> torch.Tensor:
        """float32 (B, D): the features at these places of the rows. `places_B` is on the device `home`."""
        if self._whole is not None:
            return self._whole[places_B]
        return torch.from_numpy(self._features.take(self._rows_N[places_B.numpy()])).to(self._device)

    def blocks(self, scores: int = 1) -> Iterator[torch.Tensor]:
        """All features in order, float32 (B, D) at a time, with `scores` float32 per image taking at most 64 MB."""
        for places in torch.arange(len(self), device=self.home).split(max(1, min(_BLOCK, _SCORES // scores))):
            yield self.take(places)


@dataclass
class Heads:
    """K classifiers: weight (K * C, D), bias (K * C,), and the running mean and variance (D,) that all normalise by."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    count: int

    def logits(self, features_BD: torch.Tensor) -> torch.Tensor:
        """float32 (B, K, C)."""
        normal_BD = (features_BD - self.mean) / (self.variance + _BN_EPS).sqrt()
        return self.of_normal(normal_BD)

    def of_normal(self, normal_BD: torch.Tensor) -> torch.Tensor:
        """The logits of features that are normalised already."""
        flat: torch.Tensor = normal_BD @ self.weight.T + self.bias
        return flat.view(len(flat), self.count, -1)


def train_heads(
    data: FeatureRows,
    targets: torch.Tensor,
    initial_CD: torch.Tensor,
    rates: list[float],
    decays: list[float],
    epochs: int,
    seed: int = 0,
) -> Iterator[Heads]:
    """Yield the classifiers after each epoch, one for each learning rate and weight decay. They are the same object,
    which training goes on to change.

    `targets` are int64 (N,), or float (N, C) of 0 and 1 for the mean binary cross-entropy. A batch of one image is
    skipped, since it has no variance. A classifier that diverges becomes infinite or NaN, and leaves the others alone.
    """
    device, count = initial_CD.device, len(rates)
    heads = Heads(
        weight=initial_CD.repeat(count, 1),
        bias=torch.zeros(count * len(initial_CD), device=device),
        mean=torch.zeros(initial_CD.shape[1], device=device),
        variance=torch.ones(initial_CD.shape[1], device=device),
        count=count,
    )
    rate_K1 = torch.tensor(rates, device=device).repeat_interleave(len(initial_CD))[:, None]
    decay_K1 = torch.tensor(decays, device=device).repeat_interleave(len(initial_CD))[:, None]
    moving_weight, moving_bias = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    generator = torch.Generator().manual_seed(seed)
    targets = targets.to(device)
    for _ in range(epochs):
        # The places and targets of an epoch are moved before it begins: a step that moved its own would wait until the
        # GPU has finished the step before.
        order_N = torch.randperm(len(data), generator=generator)
        batches = zip(order_N.to(data.home).split(BATCH), targets[order_N.to(device)].split(BATCH), strict=True)
        for places_B, targets_B in batches:
            if len(places_B) == 1:
                continue
            normal_BD = _normalise(heads, data.take(places_B))
            slope_BKC = _slope(heads.of_normal(normal_BD), targets_B).flatten(1)
            moving_weight.mul_(MOMENTUM).addmm_(slope_BKC.T, normal_BD).addcmul_(decay_K1, heads.weight)
            moving_bias.mul_(MOMENTUM).add_(slope_BKC.sum(dim=0)).addcmul_(decay_K1[:, 0], heads.bias)
            heads.weight.addcmul_(rate_K1, moving_weight, value=-1)
            heads.bias.addcmul_(rate_K1[:, 0], moving_bias, value=-1)
        yield heads


def _normalise(heads: Heads, features_BD: torch.Tensor) -> torch.Tensor:
    """Normalise by the batch's own mean and variance, and let the running ones follow them."""
    variance_D, mean_D = torch.var_mean(features_BD, dim=0, correction=0)
    unbiased_D = variance_D * len(features_BD) / (len(features_BD) - 1)
    heads.mean.lerp_(mean_D, _BN_MOMENTUM)
    heads.variance.lerp_(unbiased_D, _BN_MOMENTUM)
    return (features_BD - mean_D) / (variance_D + _BN_EPS).sqrt()


def _slope(logits_BKC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """d loss / d logits of the mean cross-entropy, or of the mean binary cross-entropy over images and classes."""
    if targets.ndim == 2:
        return (logits_BKC.sigmoid() - targets[:, None]) / targets.numel()
    chosen_BC = F.one_hot(targets, logits_BKC.shape[2])
    return (logits_BKC.softmax(dim=2) - chosen_BC[:, None]) / len(targets)
