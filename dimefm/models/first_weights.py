"""First weights of an image tower, from anywhere that open_clip or timm knows, or from a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file

from cache_schemas import StudentSpec
from cache_schemas.run import WEIGHTS_FILE
from dimefm.errors import TrainingError
from dimefm.models.hub import preprocess_config
from dimefm.models.names import unknown_tag
from dimefm.models.pretraining import agreeing_fields, tags_of
from dimefm.models.towers import has_activation

_PROJECTION = ("proj", "head.", "trunk.head.weight", "trunk.head.bias", "trunk.head.fc.")
"""Names of the projection's tensors, which may stay random: they have the width of another teacher, or are missing in a
tower that did not belong to a CLIP."""


def fit_to_first_weights(
    spec: StudentSpec,
    init: str,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    activation: str | None = None,
) -> StudentSpec:
    """The student with the mean and std that its first weights were trained with, in place of its teacher's.

    `init` is as for `load_first_weights`; `mean`, `std` and `activation` are what the user gives for a file.

    Raises TrainingError if the weights were trained with another activation than the teacher's, which the student must
    have; and if one of these facts is neither given nor follows from the known weights that fit the tower.
    """
    found, is_file = _trained_with(spec.name, init)
    if found is None:
        return spec  # load_first_weights then says that they are not there
    facts = {"mean": mean, "std": std, "activation": activation}
    given = {name: value for name, value in facts.items() if value is not None}
    wanted = ("mean", "std", *(["activation"] if has_activation(spec) else []))
    known = [] if is_file else list(found)  # of a file, the user may know better than the tags
    idle = [f"init_{name}" for name in given if name not in wanted or name in known]
    if idle:
        what = f"{', '.join(idle)}: no effect, as {init} says that itself or {spec.name} has none"
        raise TrainingError(what, remedy="leave it out")
    found |= given
    lacking = [name for name in wanted if name not in found]
    if lacking:
        what = f"{init} does not say with which {' and '.join(lacking)} it was trained, nor do known weights"
        words = {"mean": "[R,G,B]", "std": "[R,G,B]", "activation": "gelu or quick_gelu"}
        remedy = "say it with " + " ".join(f"--set init_{name}={words[name]}" for name in lacking)
        raise TrainingError(f"{what} of {spec.name} agree", remedy=remedy)
    if has_activation(spec) and found["activation"] != spec.activation:
        what = f"{init} was trained with {found['activation']}, and the student has the activation of its teacher"
        fit = [tag for tag, cfg in tags_of(spec.name).items() if _activation(cfg) == spec.activation]
        remedy = f"give weights trained with {spec.activation} ({', '.join(fit) or 'no tag has it'}), or no --init"
        raise TrainingError(f"{what}, {spec.activation}", remedy=remedy)
    return replace(spec, mean=tuple(found["mean"]), std=tuple(found["std"]))


def _trained_with(name: str, init: str) -> tuple[dict[str, Any] | None, bool]:
    """The mean, std and activation of first weights, as far as they are known (None if there are no such weights); and
    whether the weights are a file. A file does not contain these facts: what all known weights of the architecture
    share stands for them."""
    path, cfgs, is_file = Path(init.removeprefix("local-dir:")), list[dict[str, Any]](), False
    if path.is_dir():
        cfgs = _facts_of_folder(f"local-dir:{path}")
    elif path.exists():
        is_file = True
        cfgs = [*tags_of(name).values(), *map(_facts_of_timm, timm.models.get_arch_pretrained_cfgs(name).values())]
    elif init == "timm":
        cfg = timm.get_pretrained_cfg(name)
        cfgs = [_facts_of_timm(cfg)] if cfg else []
    elif init in tags_of(name):
        cfgs = [tags_of(name)[init]]
    else:
        return None, False
    found = {field: value for field, value in agreeing_fields(cfgs).items() if field in ("mean", "std")}
    activations = {_activation(cfg) for cfg in cfgs}
    if len(activations) == 1:
        found["activation"] = activations.pop()
    return found, is_file


def _activation(cfg: Mapping[str, Any]) -> str:
    return "quick_gelu" if cfg.get("quick_gelu", False) else "gelu"


def _facts_of_folder(name: str) -> list[dict[str, Any]]:
    try:
        activation = open_clip.get_model_config(name).get("quick_gelu", False)
        return [{**preprocess_config(name), "quick_gelu": activation}]
    except (OSError, ValueError):  # no config, or none of open_clip
        return []


def _facts_of_timm(cfg: Any) -> dict[str, Any]:
    return {"mean": cfg.mean, "std": cfg.std}


def load_first_weights(module: Any, spec: StudentSpec, init: str) -> list[str]:
    """Load weights into the image tower. Returns the names of the tensors that stay random, all of the projection.

    `init` is a tag of open_clip for the student's model, ``timm`` for timm's pretrained weights of it, a .safetensors
    or .pt file, or a folder that open_clip or `dimefm export` wrote. Names may have the prefix ``visual.`` of a whole
    CLIP, or lack the ``trunk.`` of a timm tower in one. Raises TrainingError if a tensor besides the projection is
    missing or has another shape.
    """
    wanted = module.state_dict()
    found = _matching(_read(spec, init), wanted)
    loaded = {name: value for name, value in found.items() if wanted[name].shape == value.shape}
    random = sorted(wanted.keys() - loaded.keys())
    missing = [name for name in random if not name.startswith(_PROJECTION)]
    if missing:
        name = missing[0]
        mine = tuple(wanted[name].shape)
        theirs = f"of shape {tuple(found[name].shape)}" if name in found else "missing"
        what = f"{init} does not fit {spec.name}: {name} {mine} is {theirs} there, as are {len(missing) - 1} more"
        raise TrainingError(what, remedy="give weights of the same tower, at the same --image-size")
    module.load_state_dict({**wanted, **loaded})
    return random


def _matching(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `state` under the tower's own names, by the spelling of names that fits best."""
    spellings = [
        {name.removeprefix("module."): value for name, value in state.items()},
        {name.removeprefix("module.").removeprefix("visual."): value for name, value in state.items()},
        {f"trunk.{name.removeprefix('module.')}": value for name, value in state.items()},
    ]
    best = max(spellings, key=lambda names: len(names.keys() & wanted.keys()))
    return {name: value for name, value in best.items() if name in wanted}


def _read(spec: StudentSpec, init: str) -> dict[str, torch.Tensor]:
    path = Path(init.removeprefix("local-dir:"))
    try:
        if path.is_dir():
            return load_file(path / WEIGHTS_FILE)
        if path.suffix == ".safetensors" and path.exists():
            return load_file(path)
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            return state.get("state_dict", state)  # type: ignore[no-any-return]
        if init == "timm":
            return timm.create_model(spec.name, pretrained=True).state_dict()
        if init in open_clip.list_pretrained_tags_by_model(spec.name):
            with warnings.catch_warnings(action="ignore"):  # about the activation, which was checked before
                return open_clip.create_model(spec.name, pretrained=init).visual.state_dict()  # type: ignore[no-any-return]
    except Exception as error:  # the hub, torch and safetensors raise many kinds; all say why
        raise TrainingError(f"{init} cannot be read: {str(error).splitlines()[0]}", remedy="see --init") from error
    what = f"{init!r} is no file, no folder and no tag of open_clip for {spec.name}"
    raise TrainingError(what, remedy=f"{unknown_tag(spec.name, init)}; or timm for timm's own weights")
