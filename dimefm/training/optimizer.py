"""The optimiser and its schedule: AdamW without decay where decay does harm; linear warm-up, then a cosine, by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

_UNDECAYED = ("positional_embedding", "pos_embed", "token_embedding", "relative_position_bias_table")
"""With "listed", a parameter with one of these in its name is not decayed, as in the authors' code."""


def parameter_groups(
    modules: Sequence[Any], weight_decay: float, undecayed: Literal["named", "listed"] = "listed"
) -> list[dict[str, Any]]:
    """Parameters in two groups: with weight decay, and without.

    With "listed", these are not decayed: vectors and biases, embeddings of tokens and positions, and what any part of a
    tower lists as no_weight_decay, as a timm trunk within an open_clip tower does (names and wildcards, as in timm).
    "named" is the rule of older runs, whose saved optimiser has these groups: vectors, positional embeddings, and what
    the tower as a whole lists.
    """
    decayed: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for module in modules:
        exempt = _listed(module) if undecayed == "listed" else _named(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (kept if parameter.ndim <= 1 or exempt(name) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _listed(module: Any) -> Callable[[str], bool]:
    patterns = [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    ]
    exact, wild = set(patterns), [pattern for pattern in patterns if "*" in pattern]

    def exempt(name: str) -> bool:
        if name in exact or name.endswith(".bias") or any(word in name for word in _UNDECAYED):
            return True
        return any(fnmatchcase(name, pattern) for pattern in wild)

    return exempt


def _named(module: Any) -> Callable[[str], bool]:
    listed = set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
    return lambda name: name in listed or "positional_embedding" in name or "pos_embed" in name


def adamw(
    modules: Sequence[Any],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    undecayed: Literal["named", "listed"] = "listed",
) -> torch.optim.AdamW:
    """Fused AdamW: five times as fast as the default on a CPU for a ViT-B/32, and faster on a GPU."""
    groups = parameter_groups(modules, weight_decay, undecayed)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, warmup_start: float, floor: float) -> float:
    """Learning rate of step 0..steps-1: linear from `warmup_start` to `peak`, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
