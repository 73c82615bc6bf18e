"""The optimiser and its schedule: AdamW, or another of timm, without decay where decay does harm; linear warm-up, then
a cosine, by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import timm.optim as timm_optim
import torch
from timm.optim import muon

from dimefm.errors import TrainingError
from dimefm.models.tower_layers import parameter_layers
from dimefm.system.near_names import did_you_mean
from dimefm.training.config import TrainConfig

_UNDECAYED = ("positional_embedding", "pos_embed", "token_embedding", "relative_position_bias_table")
"""With "listed", a parameter with one of these in its name is not decayed, as in the authors' code."""


_timm: Any = timm_optim  # which does not list what it exports, for mypy
_REFUSED = {
    "adahessian": "it needs second derivatives",
    **dict.fromkeys(("kron", "kronc", "kronw"), "it draws random numbers that are in no checkpoint"),
}
"""Optimisers of timm that cannot be used here, and why."""


def require_optimizer(config: TrainConfig) -> None:
    """Raises TrainingError for an `optimizer` that timm does not have or that cannot be used here, and for `betas` and
    `eps` that it does not take."""
    name = config.optimizer
    if name == "adamw":
        return
    known = {name for name in _timm.list_optimizers() if _is_here(name) and name not in _REFUSED}
    if name in _REFUSED:
        raise TrainingError(f"optimizer {name} cannot be used: {_REFUSED[name]}", remedy="give another, such as adamw")
    if name not in known:
        listed = "timm.optim.list_optimizers() lists them; those of apex and bitsandbytes are not used here"
        raise TrainingError(f"timm has no optimizer called {name!r}", remedy=did_you_mean(name, known, listed))
    info = _timm.get_optimizer_info(name)
    takes = {"betas": info.has_betas and info.num_betas == 2, "eps": info.has_eps}
    idle = [field for field in _given(config) if not takes[field]]
    if idle:
        raise TrainingError(f"no effect with optimizer {name}: {' and '.join(idle)}", remedy="leave that out")


def _is_here(name: str) -> bool:
    return not isinstance(_timm.get_optimizer_info(name).opt_class, str)  # else apex or bitsandbytes has it


def _given(config: TrainConfig) -> dict[str, Any]:
    """Those of `betas` and `eps` that are not AdamW's, which are the defaults."""
    values = {name: getattr(config, name) for name in ("betas", "eps")}
    return {name: value for name, value in values.items() if value != getattr(TrainConfig, name)}


def optimizer_of(
    config: TrainConfig,
    modules: Sequence[Any],
    towers: Mapping[str, Any],
    undecayed: Literal["named", "listed"] = "listed",
) -> torch.optim.Optimizer:
    """The optimiser of a config for all parameters of `modules`. Of them, `towers` by the names of their models are
    those that `layer_decay` is for. Raises TrainingError for a tower that it cannot be for, and as `require_optimizer`.

    Another one than AdamW has timm's values for what the config does not say, such as a momentum of 0.9; its betas and
    eps are its own unless the config has others than AdamW's.
    """
    require_optimizer(config)
    scales = _scales(towers, config.layer_decay) if config.layer_decay is not None else {}
    groups = parameter_groups(modules, config.weight_decay, undecayed, scales)
    if config.optimizer == "adamw":
        return _adamw(groups, config.lr, config.betas, config.eps)
    groups = [group for group in groups if group["params"]]
    made: torch.optim.Optimizer = _timm.create_optimizer_v2(
        groups, config.optimizer, config.lr, config.weight_decay, **_given(config)
    )
    if isinstance(made, muon.Muon):
        _orthogonalise_in(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return made


def _orthogonalise_in(dtype: torch.dtype) -> None:
    """Let timm's Muon make its matrices orthogonal in the precision of the run. It does so in bf16 whatever the run
    has, which many processors only emulate: a step then takes up to twelve times as long."""
    usual = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(getattr(usual, "func", usual), dtype=dtype)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the state in a checkpoint. Settings of its groups stay those of the config, which --allow-changes may have
    changed since."""
    settings = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, of_config in zip(optimizer.param_groups, settings, strict=True):
        group.update(of_config)


def _scales(towers: Mapping[str, Any], layer_decay: float) -> dict[torch.nn.Parameter, float]:
    """The share of the learning rate that each parameter of these towers has: 1 for the projection, and `layer_decay`
    times as much with every layer before it (Clark et al. 2020, arXiv:2003.10555)."""
    found: dict[torch.nn.Parameter, float] = {}
    for name, tower in towers.items():
        layers = parameter_layers(tower, name)
        last = max(layers.values())
        found |= {p: layer_decay ** (last - layers[path]) for path, p in tower.named_parameters()}
    return found


def parameter_groups(
    modules: Sequence[Any],
    weight_decay: float,
    undecayed: Literal["named", "listed"] = "listed",
    scales: Mapping[torch.nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameters in two groups: with weight decay, and without. With `scales` there are two for each share of the
    learning rate that a parameter may have (1 where none is named), which is the "lr_scale" of the group.

    With "listed", these are not decayed: vectors and biases, embeddings of tokens and positions, and what any part of a
    tower lists as no_weight_decay, as a timm trunk within an open_clip tower does (names and wildcards, as in timm).
    "named" is the rule of older runs, whose saved optimiser has these groups: vectors, positional embeddings, and what
    the tower as a whole lists.
    """
    shares, scales = sorted({1.0, *(scales or {}).values()}), scales or {}
    decayed: dict[float, list[torch.Tensor]] = {share: [] for share in shares}
    kept: dict[float, list[torch.Tensor]] = {share: [] for share in shares}
    for module in modules:
        exempt = _listed(module) if undecayed == "listed" else _named(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                group = kept if parameter.ndim <= 1 or exempt(name) else decayed
                group[scales.get(parameter, 1.0)].append(parameter)
    groups: list[dict[str, Any]] = []
    for share in shares:
        scale = {"lr_scale": share} if scales else {}
        groups.append({"params": decayed[share], "weight_decay": weight_decay, **scale})
        groups.append({"params": kept[share], "weight_decay": 0.0, **scale})
    return groups


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
) -> torch.optim.AdamW:
    """AdamW over all parameters of `modules`."""
    return _adamw(parameter_groups(modules, weight_decay), lr, betas, eps)


def _adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Fused AdamW: five times as fast as the default on a CPU for a ViT-B/32, and faster on a GPU."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, warmup_start: float, floor: float) -> float:
    """Learning rate of step 0..steps-1: linear from `warmup_start` to `peak`, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
