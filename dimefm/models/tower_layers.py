"""How deep in its tower each parameter is, for learning rates that fall with the distance from the output."""

from __future__ import annotations

import re
from typing import Any

from timm.models import group_parameters

from dimefm.errors import TrainingError

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layer(\d+))\.(\d+)\.")
"""A block of open_clip's own towers: transformer.resblocks.3, or layer2.0 of a ResNet."""

_BEFORE = {"class_embedding", "positional_embedding", "token_embedding", "patchnorm_pre_ln", "ln_pre", "cls_emb",
           "conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}  # fmt: skip
"""Parts of open_clip's own towers that come before the blocks."""


def parameter_layers(tower: Any, name: str) -> dict[str, int]:
    """The layer of each parameter of a tower called `name`: 0 for the embedding of patches or tokens, then one for each
    block, and the largest for the projection. Trunks of timm are cut as timm cuts them.

    Raises TrainingError for a tower whose layers are not known.
    """
    names = [name for name, _ in tower.named_parameters()]
    trunk = getattr(tower, "trunk", None)
    try:
        if trunk is not None:
            cut = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
            found = {f"trunk.{name}": int(layer) for name, layer in cut.items()}
            return {name: found.get(name, max(found.values()) + 1) for name in names}
    except (AttributeError, NotImplementedError):
        raise _unknown(name) from None
    blocks = {name: (int(match[1] or 0), int(match[2])) for name in names if (match := _BLOCK.search(name))}
    if not blocks:
        raise _unknown(name)
    order = {block: layer for layer, block in enumerate(sorted(set(blocks.values())), 1)}
    rest = {name: 0 if name.partition(".")[0] in _BEFORE else len(order) + 1 for name in names if name not in blocks}
    return {name: order[blocks[name]] if name in blocks else rest[name] for name in names}


def _unknown(name: str) -> TrainingError:
    return TrainingError(f"the layers of {name} are not known, by which layer_decay goes", remedy="leave it out")
