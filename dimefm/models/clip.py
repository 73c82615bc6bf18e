"""Any open_clip model, loaded strictly: the teacher of stage 1, and what `evaluate` and `export` work on.

Where open_clip warns and goes on (random weights, another activation than the weights were trained with), this
refuses. Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import nn
from torch.nn import functional as F

from cache_schemas import Preprocessing, TeacherIdentity
from cache_schemas.identity import Precision
from dimefm.errors import MismatchError, TeacherError
from dimefm.images.preprocess import normalise
from dimefm.models.hub import fetch_weights, require_plain_tokenizer
from dimefm.models.pretraining import Trained, facts_of_config, facts_of_weights, other_activation
from dimefm.models.tokenizer import fast_tokenizer, open_tokenizer
from dimefm.models.towers import has_convolutions
from dimefm.system import storage
from dimefm.system.machine import choose_device
from dimefm.system.matrix_products import DTYPES
from dimefm.system.transfer import Transfer

_SAME = 1e-4  # between unit vectors: above the rounding of float32, far below a change of any use
_CONFIGURED = ("local-dir:", "hf-hub:")  # names of what brings a config with it
_DECODER = "multimodal_cfg"  # of a CoCa's config


class Clip:
    """A loaded CLIP model on a device, in evaluation mode; embeddings come out normalised, in float32.

    Its weights are held in the precision of its products: nothing is cast from call to call, and a GPU reads and writes
    half as much. Only batch norm keeps float32, whose running variances may be beyond float16.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: TeacherIdentity, model_cfg: dict[str, Any], device: str
    ) -> None:
        self.identity = identity
        self.model_cfg = model_cfg
        self.device = torch.device(device)
        self.tokenizer, self._tokenize = tokenizer, fast_tokenizer(tokenizer)
        self._dtype = DTYPES[identity.precision]
        self.model: Any = _hold(model.eval().requires_grad_(False), self._dtype).to(self.device)
        self._transfer = Transfer(self.device)
        self._layout = torch.channels_last if has_convolutions(self.model.visual) else torch.contiguous_format
        self.model.visual.to(memory_format=self._layout)
        self._encode_image = self.model.encode_image
        self._compiled_batch = 0

    def on(self, device: str) -> Clip:
        """The same model on `device`, moved there."""
        if self.device == torch.device(device):
            return self
        return Clip(self.model, self.tokenizer, self.identity, self.model_cfg, device)

    def in_float32(self) -> Clip:
        """A copy, of the weights as they are held, that computes in float32: for what overflows in float16."""
        identity = replace(self.identity, precision="fp32")
        return Clip(copy.deepcopy(self.model), self.tokenizer, identity, self.model_cfg, str(self.device))

    def weight_bytes(self) -> int:
        """Bytes of the weights as they are."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def compile(self, batch_size: int) -> None:
        """Compile the image tower for batches of up to `batch_size`: minutes at first, then faster.

        Without CUDA graphs: a batch keeps a GPU busy for fifty times as long as its kernels take to launch, and a graph
        belongs to the thread that recorded it.
        """
        self._encode_image = torch.compile(self.model.encode_image, dynamic=False)
        self._compiled_batch = batch_size

    @property
    def compiled(self) -> bool:
        """Whether batches of images are filled up to one size, for which the image tower was compiled."""
        return self._compiled_batch > 0

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W), preprocessed but not normalised, to unit-norm float32 (B, D) on the device."""
        facts, count = self.identity.preprocessing, len(pixels_B3HW)
        pixels_B3HW = self._transfer.send(pixels_B3HW)
        if count < self._compiled_batch:  # one shape, compiled once
            pixels_B3HW = F.pad(pixels_B3HW, (0, 0, 0, 0, 0, 0, 0, self._compiled_batch - count))
        with torch.inference_mode():
            images = normalise(pixels_B3HW, facts.mean, facts.std).to(self._dtype, memory_format=self._layout)
            features_BD = self._encode_image(images)[:count]
        return F.normalize(features_BD.float(), dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Sentences to unit-norm float32 (B, D) on the device; what goes beyond the context length is cut off."""
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Sentences to int64 (B, L), L the context length."""
        return self._tokenize(texts)

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Tokens to unit-norm float32 (B, D) on the device. The padding that all of them share is left out where the
        text tower does not look at it."""
        if self._ignores_padding:
            tokens_BL = tokens_BL[:, : token_counts(tokens_BL).max()]
        return F.normalize(self._encode_tokens(tokens_BL).float(), dim=-1)

    def _encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        tokens_BL, length, model = self._transfer.send(tokens_BL), tokens_BL.shape[1], self.model
        # Of fewer tokens, open_clip would still add the whole mask, and a plain CLIP all of its positions.
        tower, name = (model.text, "model.text") if hasattr(model, "text") else (model, "model")
        cut = {} if tower is not model else {"model.positional_embedding": model.positional_embedding[:length]}
        if isinstance(getattr(tower, "attn_mask", None), torch.Tensor):
            cut[f"{name}.attn_mask"] = tower.attn_mask[:length, :length]
        with torch.inference_mode():
            if length == self.identity.context_length or not cut:
                return model.encode_text(tokens_BL)  # type: ignore[no-any-return]
            return torch.func.functional_call(_Text(model), cut, (tokens_BL,))  # type: ignore[no-any-return]

    @cached_property
    def _ignores_padding(self) -> bool:
        """Whether a sentence comes out the same without its padding: so it does behind a causal mask, or a mask of the
        padding; found out by trying, in float32."""
        tokens_BL = self.tokenize(["a photo of a cat", "two dogs"])
        length = int(token_counts(tokens_BL).max())
        clip = self if self._dtype == torch.float32 else self.in_float32()
        try:
            cut_BD, whole_BD = clip._encode_tokens(tokens_BL[:, :length]), clip._encode_tokens(tokens_BL)
        except (RuntimeError, AttributeError, IndexError, ValueError):
            return False
        difference_BD = F.normalize(cut_BD.float(), dim=-1) - F.normalize(whole_BD.float(), dim=-1)
        return bool((difference_BD.norm(dim=-1) < _SAME).all())

    def text_digest(self) -> str:
        """sha256 of what decides the embedding of a sentence: the text tower, its tokenizer, activation, precision."""
        facts, state = self.identity, self.model.state_dict()
        tower = {name: value for name, value in state.items() if not name.startswith(("visual.", "logit_"))}
        said = (facts.tokenizer, facts.context_length, facts.activation, facts.precision)
        return hashlib.sha256(f"{digest_tensors(tower)} {said}".encode()).hexdigest()


def _hold(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights and buffers in `dtype`, batch norm's excepted."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module._apply(lambda value: value.to(dtype) if value.is_floating_point() else value, recurse=False)
    return model


class _Text(nn.Module):
    """The text side of a model as a module's forward, which is what functional_call can call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens_BL)  # type: ignore[no-any-return]


def token_counts(tokens_BL: torch.Tensor) -> np.ndarray[Any, Any]:
    """Tokens of each sentence, int64 (B,), with one of the equal tokens at its end: the padding, or an end token that
    is also the padding."""
    differs_BL = tokens_BL != tokens_BL[:, -1:]
    places_L = torch.arange(1, tokens_BL.shape[1] + 1)
    count_B: np.ndarray[Any, Any] = (differs_BL * places_L).amax(dim=1).numpy()
    return (count_B + 1).clip(max=tokens_BL.shape[1])


def teacher_precision(device: str) -> Precision:
    """The precision of a teacher that none was named for: fp16 on a GPU, fp32 on a CPU.

    The teacher runs once and its rounding is cached for good: bf16, as fast, is 40 to 460 times further from fp32 in
    1 - cosine (`python -m benchmarks precision`). Rows that overflow are computed again
    (caching.encode_rows).
    """
    return "fp16" if device.startswith("cuda") else "fp32"


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    trained: Trained | None = None,
    known: TeacherIdentity | None = None,
    precision: Precision | None = None,
    device: str | None = None,
) -> Clip:
    """Load a model by open_clip's names: an architecture and a tag or file, ``hf-hub:org/model``, ``local-dir:FOLDER``.

    What a file of weights, or a folder's config, does not say of the preprocessing comes from `trained`, the user's
    word; else from `known`, the identity that a document has of these weights; else from models.pretraining.
    `precision` is that of the matrix products; None is `teacher_precision`. Raises TeacherError for an unknown name,
    missing weights, weights trained with another activation, or of which nobody has said what must be, a model without
    a text tower, or one that could run code of its own (see dimefm.models.hub).
    """
    device = choose_device(device)
    precision = precision or teacher_precision(device)
    name, pretrained = _in_full(name, pretrained)
    said, configured = trained or Trained(), name.startswith(_CONFIGURED)
    if not configured:
        facts = facts_of_weights(name, pretrained or "", said, known)  # before a large file is loaded
    model = _create(name, pretrained)
    if configured:
        facts = facts_of_config(name, said, known)
    model_cfg = open_clip.get_model_config(name)
    if not model_cfg or not hasattr(model, "encode_text"):
        raise TeacherError(f"{name} is not a two-tower CLIP model", remedy="use one with an image and a text tower")
    require_plain_tokenizer(name, model_cfg)
    if _DECODER in model_cfg:
        model, model_cfg = _without_decoder(model, model_cfg)
    preprocessing = replace(_preprocessing(model), **facts.preprocessing)
    return wrap(
        model, name, pretrained, model_cfg, precision=precision, device=device, preprocessing=preprocessing,
        preprocessing_from=facts.origin,
    )  # fmt: skip


def require_teacher(
    clip: Clip, known: TeacherIdentity, where: str, *, remedy: str, any_precision: bool = False
) -> None:
    """Raises MismatchError unless `clip` is the teacher `known`, whose embeddings `where` has or was trained on.

    With `any_precision` its matrix products may be in another precision than they were then.
    """
    differences = known.differences(clip.identity, ignore=("precision",) if any_precision else ())
    if differences:
        what = f"{clip.identity.name} is not the teacher of {where}: {'; '.join(differences)}"
        raise MismatchError(what, remedy=remedy)


def _without_decoder(coca: Any, model_cfg: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The two towers of a CoCa as a plain model and its config. What CoCa's towers give beside their embeddings, and
    its decoder, are for captions: left out, a student can take the place of the image tower."""
    towers = {part: {**model_cfg[part], "output_tokens": False} for part in ("vision_cfg", "text_cfg")}
    plain_cfg = {name: value for name, value in model_cfg.items() if name != _DECODER} | towers
    with torch.device("meta"):
        plain = open_clip.CustomTextCLIP(**{name: value for name, value in plain_cfg.items() if name != "custom_text"})
    for part in ("visual", "text", "logit_scale", "logit_bias"):
        setattr(plain, part, getattr(coca, part))
    plain.visual.output_tokens = plain.text.output_tokens = False
    return plain, plain_cfg


def _in_full(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """As they are recorded: paths from the root. Raises TeacherError where no weights are named."""
    if name.startswith("local-dir:"):
        return f"local-dir:{storage.absolute(name.removeprefix('local-dir:'))}", pretrained
    if name.startswith(_CONFIGURED):
        return name, pretrained
    if not pretrained and Path(name).is_dir():
        raise TeacherError(f"{name} is a folder", remedy=f"name it local-dir:{name}")
    name = name.replace("/", "-")  # OpenAI writes ViT-B/32, and open_clip takes that
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none known for this name"
        raise TeacherError(f"no weights named for {name}", remedy=f"give --pretrained TAG or FILE (tags: {tags})")
    is_file = not open_clip.get_pretrained_cfg(name, pretrained) and Path(pretrained).is_file()
    return name, storage.absolute(pretrained) if is_file else pretrained


def wrap(
    model: Any,
    name: str,
    pretrained: str | None,
    model_cfg: dict[str, Any],
    *,
    precision: Precision,
    device: str,
    preprocessing: Preprocessing | None = None,
    preprocessing_from: str | None = None,
) -> Clip:
    """A Clip around an open_clip model that is already built, with the identity read off the model itself."""
    tokenizer = open_tokenizer(name)
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
        preprocessing_from=preprocessing_from,
    )
    return Clip(model, tokenizer, identity, model_cfg, device)


def _create(name: str, pretrained: str | None) -> Any:
    _check_activation(name, pretrained)
    logging.getLogger().addFilter(_quiet)
    try:
        if name.startswith("hf-hub:"):
            fetch_weights(name)
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean that the teacher is not to be had
        reason = str(error).strip().split("\n")[0]
        raise TeacherError(f"cannot load {name}: {reason}", remedy="see open_clip.list_pretrained()") from error
    finally:
        logging.getLogger().removeFilter(_quiet)
    return model


def _check_activation(name: str, pretrained: str | None) -> None:
    """Refuse a tag whose weights were trained with another activation than the architecture has: open_clip warns."""
    if name.startswith(_CONFIGURED):
        return
    cfg, tag = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, pretrained or "")
    if not cfg or not tag:
        return
    wanted, found = bool(tag.get("quick_gelu", False)), bool(cfg.get("quick_gelu", False))
    other = other_activation(name)
    if wanted != found and other:  # else the weights were trained with the only one that there is
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
    return digest_tensors(model.state_dict())


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """As `digest_weights`, of some tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
