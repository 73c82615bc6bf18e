"""The recipe's optimiser: AdamW without decay on vectors, linear warm-up, cosine to a floor, by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def parameter_groups(modules: Sequence[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: decayed, and not: biases, norms and other 1-d tensors, logit scales, positional
    embeddings and what the tower itself lists as no_weight_decay."""
    decayed: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for module in modules:
        listed = set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            exempt = parameter.ndim <= 1 or name in listed or "positional_embedding" in name or "pos_embed" in name
            (kept if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def adamw(
    modules: Sequence[Any], *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Fused AdamW: five times as fast as the default on a CPU for a ViT-B/32, and faster on a GPU."""
    return torch.optim.AdamW(parameter_groups(modules, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, warmup_start: float, floor: float) -> float:
    """Learning rate of step 0..steps-1: linear from `warmup_start` to `peak`, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
