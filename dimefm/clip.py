"""Any open_clip model, loaded strictly: the teacher of stage 1, and what `evaluate` and `export` work on.

Where open_clip warns and goes on (random weights, another activation than the weights were trained with), this
refuses. Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import nn
from torch.nn import functional as F

from cache_schemas import Preprocessing, TeacherIdentity
from dimefm import storage
from dimefm.device import choose_device
from dimefm.errors import TeacherError
from dimefm.preprocess import normalise
from dimefm.student import has_convolutions

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Clip:
    """A loaded CLIP model on a device, in evaluation mode; embeddings come out normalised, in float32."""

    def __init__(
        self, model: Any, tokenizer: Any, identity: TeacherIdentity, model_cfg: dict[str, Any], device: str
    ) -> None:
        self.identity = identity
        self.model_cfg = model_cfg
        self.device = torch.device(device)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        self._dtype = _DTYPES[identity.precision]
        if has_convolutions(self.model.visual):
            self.model.visual.to(memory_format=torch.channels_last)

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W), preprocessed but not normalised, to unit-norm float32 (B, D) on the device."""
        facts = self.identity.preprocessing
        pixels_B3HW = pixels_B3HW.to(self.device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            images = normalise(pixels_B3HW, facts.mean, facts.std).to(memory_format=torch.channels_last)
            features_BD = self.model.encode_image(images)
        return F.normalize(features_BD.float(), dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Sentences to unit-norm float32 (B, D) on the device; what goes beyond the context length is cut off."""
        tokens_BL = self.tokenizer(texts).to(self.device)
        with torch.inference_mode(), self._autocast():
            features_BD = self.model.encode_text(tokens_BL)
        return F.normalize(features_BD.float(), dim=-1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)


def load_clip(
    name: str, pretrained: str | None = None, *, precision: Precision | None = None, device: str | None = None
) -> Clip:
    """Load a model by open_clip's names: an architecture and a tag or file, ``hf-hub:org/model``, ``local-dir:FOLDER``.

    `precision` is that of the matrix products: bf16 on a GPU and fp32 on a CPU unless said. Raises TeacherError for
    an unknown name, missing weights, weights trained with another activation, or a model without a text tower.
    """
    device = choose_device(device)
    precision = precision or ("bf16" if device.startswith("cuda") else "fp32")
    if name.startswith("local-dir:"):
        name = f"local-dir:{storage.absolute(name.removeprefix('local-dir:'))}"
    if pretrained and Path(pretrained).is_file():
        pretrained = storage.absolute(pretrained)
    if not name.startswith(("local-dir:", "hf-hub:")) and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none known for this name"
        raise TeacherError(f"no weights named for {name}", remedy=f"give --pretrained TAG or FILE (tags: {tags})")
    model = _create(name, pretrained)
    model_cfg = open_clip.get_model_config(name)
    if not model_cfg or not hasattr(model, "encode_text") or "multimodal_cfg" in model_cfg:
        raise TeacherError(f"{name} is not a two-tower CLIP model", remedy="use one with an image and a text tower")
    return wrap(model, name, pretrained, model_cfg, precision=precision, device=device)


def wrap(
    model: Any,
    name: str,
    pretrained: str | None,
    model_cfg: dict[str, Any],
    *,
    precision: Precision,
    device: str,
    preprocessing: Preprocessing | None = None,
) -> Clip:
    """A Clip around an open_clip model that is already built, with the identity read off the model itself."""
    tokenizer = open_clip.get_tokenizer(name)
    identity = TeacherIdentity(
        name=name,
        pretrained=pretrained,
        weights=digest_weights(model),
        activation="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        preprocessing=preprocessing or _preprocessing(model),
        tokenizer=_tokenizer_name(model_cfg, tokenizer),
        context_length=int(tokenizer.context_length),
        embed_dim=int(model_cfg["embed_dim"]),
        precision=precision,
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=None if getattr(model, "logit_bias", None) is None else float(model.logit_bias.detach()),
    )
    return Clip(model, tokenizer, identity, model_cfg, device)


def _create(name: str, pretrained: str | None) -> Any:
    _check_activation(name, pretrained)
    logging.getLogger().addFilter(_quiet)
    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean that the teacher is not to be had
        reason = str(error).strip().split("\n")[0]
        raise TeacherError(f"cannot load {name}: {reason}", remedy="see open_clip.list_pretrained()") from error
    finally:
        logging.getLogger().removeFilter(_quiet)
    return model


def _check_activation(name: str, pretrained: str | None) -> None:
    """Refuse a tag whose weights were trained with another activation than the architecture has: open_clip warns."""
    if name.startswith(("local-dir:", "hf-hub:")):
        return
    cfg, tag = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, pretrained or "")
    if not cfg or not tag:
        return
    wanted, found = bool(tag.get("quick_gelu", False)), bool(cfg.get("quick_gelu", False))
    if wanted != found:
        other = name.removesuffix("-quickgelu") if found else f"{name}-quickgelu"
        kind = "QuickGELU" if wanted else "GELU"
        raise TeacherError(
            f"the weights {pretrained} of {name} were trained with {kind}, which {name} does not use",
            remedy=f"use --teacher {other} --pretrained {pretrained}",
        )


def _quiet(record: logging.LogRecord) -> bool:
    """open_clip logs to the root logger; what matters of it is raised."""
    return "open_clip" not in record.pathname


def _preprocessing(model: nn.Module) -> Preprocessing:
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


def _tokenizer_name(model_cfg: dict[str, Any], tokenizer: Any) -> str:
    text_cfg = model_cfg["text_cfg"]
    named = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or type(tokenizer).__name__
    options = {k: text_cfg[k] for k in ("tokenizer_kwargs", "tokenizer_mode") if text_cfg.get(k)}
    return f"{named} {json.dumps(options, sort_keys=True)}" if options else str(named)


def digest_weights(model: nn.Module) -> str:
    """sha256 over the names, shapes and float32 values of all weights in order of name, as hex."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
