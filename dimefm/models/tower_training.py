"""What a tower may do in training alone, to save memory and time: it has the same weights, and is the same in
evaluation."""

from __future__ import annotations

from typing import Any

import open_clip.transformer
from timm.layers.patch_dropout import PatchDropout
from timm.models.vision_transformer import VisionTransformer

from dimefm.errors import TrainingError


def checkpoint_gradients(tower: Any, name: str) -> None:
    """Let a tower keep only the inputs of its blocks for the backward pass, which computes the rest again (Chen et al.
    2016, arXiv:1604.06174). Raises TrainingError for a tower, called `name`, that cannot."""
    try:
        getattr(tower, "trunk", tower).set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError):
        done = False
    else:  # some towers have the function, and it does nothing
        flags = ("grad_checkpointing", "gradient_checkpointing")
        done = any(getattr(part, flag, False) is True for part in tower.modules() for flag in flags)
    if not done:
        what = f"{name} has no gradient checkpointing"
        raise TrainingError(what, remedy="leave --gradient-checkpointing out; --accumulate saves memory with any tower")


def drop_patches(tower: Any, name: str, share: float) -> None:
    """Let an image tower leave out a random `share` of the patches of each image in training (Li et al. 2022,
    arXiv:2212.00794). Raises TrainingError for a tower, called `name`, that is no plain vision transformer."""
    trunk = getattr(tower, "trunk", tower)
    if isinstance(trunk, VisionTransformer):
        trunk.patch_drop = PatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens)
    elif isinstance(trunk, open_clip.transformer.VisionTransformer):  # whose own draws in memory: a GPU would wait
        trunk.patch_dropout = PatchDropout(share, num_prefix_tokens=1)
    else:
        what = f"{name} is no plain vision transformer, of which patches could be left out"
        raise TrainingError(what, remedy="leave --patch-dropout out, or give a --student such as ViT-S-32")
