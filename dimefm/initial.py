"""First weights of an image tower, from anywhere that open_clip or timm knows, or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file

from cache_schemas import StudentSpec
from dimefm.errors import TrainingError

_PROJECTION = ("proj", "head.", "trunk.head.weight", "trunk.head.bias", "trunk.head.fc.")
"""What may stay random: of the width of another teacher, or missing in a tower that was not a CLIP's."""

_WEIGHTS_FILE = "open_clip_model.safetensors"


def load_initial(module: Any, spec: StudentSpec, init: str) -> list[str]:
    """Load weights into the image tower; the names of the tensors that stay random, all of the projection.

    `init` is a tag of open_clip for the student's model, ``timm`` for timm's pretrained weights of it, a .safetensors
    or .pt file, or a folder that open_clip or `dimefm export` wrote. Names may have the prefix ``visual.`` of a whole
    CLIP, or lack the ``trunk.`` of a timm tower in one. Raises TrainingError where a tensor besides the
    projection is missing or of another shape.
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
        raise TrainingError(what, remedy="give weights of this very tower, at this --image-size")
    module.load_state_dict({**wanted, **loaded})
    return random


def _matching(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the tower's own names, whichever prefix fits best."""
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
            return load_file(path / _WEIGHTS_FILE)
        if path.suffix == ".safetensors" and path.exists():
            return load_file(path)
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            return state.get("state_dict", state)  # type: ignore[no-any-return]
        if init == "timm":
            return timm.create_model(spec.name, pretrained=True).state_dict()
        if init in open_clip.list_pretrained_tags_by_model(spec.name):
            return open_clip.create_model(spec.name, pretrained=init).visual.state_dict()  # type: ignore[no-any-return]
    except Exception as error:  # of the hub, of torch's reader and of safetensors: all say why
        raise TrainingError(f"{init} cannot be read: {str(error).splitlines()[0]}", remedy="see --init") from error
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(spec.name)) or "none"
    what = f"{init!r} is no file, no folder and no tag of open_clip for {spec.name} (those: {tags})"
    raise TrainingError(what, remedy="give one of them, or timm for timm's own weights")
