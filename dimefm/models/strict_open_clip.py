"""open_clip's own functions for building a model, made strict. Where they warn and go on (random weights, another
activation than the weights were trained with), these raise TeacherError.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from cache_schemas import Preprocessing
from dimefm.errors import TeacherError
from dimefm.models.hub import fetch_weights
from dimefm.models.names import CONFIGURED, TIMM, require_model
from dimefm.models.pretraining import other_activation
from dimefm.system import storage

DECODER = "multimodal_cfg"
"""What the config of a CoCa has besides its two towers."""


def full_name(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """Name and weights as they are recorded: with absolute paths. Raises TeacherError where one does not exist."""
    require_model(name, pretrained)
    if name.startswith("local-dir:"):
        return f"local-dir:{storage.absolute(name.removeprefix('local-dir:'))}", pretrained
    if name.startswith(TIMM):
        if (model := name.removeprefix(TIMM)).startswith("local-dir:"):
            name = f"{TIMM}local-dir:{storage.absolute(model.removeprefix('local-dir:'))}"
        return name, pretrained and storage.absolute(pretrained)
    if name.startswith(CONFIGURED) or pretrained is None:
        return name, pretrained
    name = name.replace("/", "-")
    is_file = not open_clip.get_pretrained_cfg(name, pretrained) and Path(pretrained).is_file()
    return name, storage.absolute(pretrained) if is_file else pretrained


def _remedy(name: str) -> str:
    """What to do about a model that cannot be loaded."""
    if name.startswith("local-dir:"):
        return "check that the folder exists and holds an open_clip_config.json with its weights"
    if name.startswith("hf-hub:"):
        return "check the name, the network and, for a private model, your token"
    return "check that the file is whole or, for a tag, that the network is there"


def create_model(name: str, pretrained: str | None) -> Any:
    """The model with its weights. Raises TeacherError for an unknown name, missing weights, or weights that were
    trained with another activation."""
    _check_activation(name, pretrained)
    logging.getLogger().addFilter(_quiet)
    try:
        if name.startswith("hf-hub:"):
            fetch_weights(name)
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean that the model cannot be had
        reason = str(error).strip().split("\n")[0].split(" Available: ")[0]  # open_clip lists all of its names
        raise TeacherError(f"cannot load {name}: {reason}", remedy=_remedy(name)) from error
    finally:
        logging.getLogger().removeFilter(_quiet)
    return model


def _check_activation(name: str, pretrained: str | None) -> None:
    """Raises TeacherError for a tag whose weights were trained with another activation than the architecture has.
    open_clip only warns."""
    if name.startswith(CONFIGURED):
        return
    cfg, tag = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, pretrained or "")
    if not cfg or not tag:
        return
    wanted, found = bool(tag.get("quick_gelu", False)), bool(cfg.get("quick_gelu", False))
    other = other_activation(name)
    if wanted != found and other:  # else the weights were trained with the only one that open_clip has
        kind = "QuickGELU" if wanted else "GELU"
        raise TeacherError(
            f"the weights {pretrained} of {name} were trained with {kind}, which {name} does not use",
            remedy=f"use --teacher {other} --pretrained {pretrained}",
        )


def _quiet(record: logging.LogRecord) -> bool:
    """Drop what open_clip logs to the root logger: this module raises what matters."""
    return "open_clip" not in record.pathname


def without_decoder(coca: Any, model_cfg: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The two towers of a CoCa as a plain model, and its config. The decoder, and what the towers give it beside their
    embeddings, make captions: without these a student can take the place of the image tower."""
    towers = {part: {**model_cfg[part], "output_tokens": False} for part in ("vision_cfg", "text_cfg")}
    plain_cfg = {name: value for name, value in model_cfg.items() if name != DECODER} | towers
    with torch.device("meta"):
        plain = open_clip.CustomTextCLIP(**{name: value for name, value in plain_cfg.items() if name != "custom_text"})
    for part in ("visual", "text", "logit_scale", "logit_bias"):
        setattr(plain, part, getattr(coca, part))
    plain.visual.output_tokens = plain.text.output_tokens = False
    return plain, plain_cfg


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How open_clip would prepare images for a model."""
    cfg = open_clip.get_model_preprocess_cfg(model)
    size = cfg["size"]
    return Preprocessing(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
        fill_color=cfg.get("fill_color", 0),
    )
