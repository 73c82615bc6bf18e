"""Any open_clip model, loaded strictly: the teacher of stage 1, and what `evaluate` and `export` work on.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
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
from dimefm.models.exported import format_of, require_as_exported
from dimefm.models.hub import require_plain_tokenizer
from dimefm.models.names import CONFIGURED, FOLDER, TIMM
from dimefm.models.pretraining import facts_of_config, facts_of_weights
from dimefm.models.strict_open_clip import (
    DECODER,
    create_model,
    full_name,
    preprocessing_of,
    without_decoder,
)
from dimefm.models.tokenizer import fast_tokenizer, open_tokenizer
from dimefm.models.towers import has_convolutions
from dimefm.models.trained import Trained
from dimefm.system.machine import choose_device
from dimefm.system.matrix_products import DTYPES
from dimefm.system.transfer import Transfer

_SAME = 1e-4  # between unit vectors: above the rounding of float32, far below a change of any use


class Clip:
    """A loaded CLIP model on a device, in evaluation mode; embeddings come out normalised, in float32.

    Its weights are held in the precision of its matrix products: nothing is cast from call to call, and a GPU reads and
    writes half as much. Only batch norm keeps float32, since its running variances may exceed float16.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: TeacherIdentity, model_cfg: dict[str, Any], device: str
    ) -> None:
        self.identity = identity
        self.model_cfg = model_cfg
        self.device = torch.device(device)
        self.tokenizer, self._tokenize = tokenizer, fast_tokenizer(tokenizer)
        self._dtype = DTYPES[identity.precision]
        self.model: Any = _convert(model.eval().requires_grad_(False), self._dtype).to(self.device)
        self._transfer = Transfer(self.device)
        self._layout = torch.channels_last if has_convolutions(self.model.visual) else torch.contiguous_format
        self.model.visual.to(memory_format=self._layout)
        self._encode_compiled: Any = None
        self._compiled_batch = 0

    def on(self, device: str) -> Clip:
        """This Clip, or one on `device` to which the model was moved."""
        if self.device == torch.device(device):
            return self
        return type(self)(self.model, self.tokenizer, self.identity, self.model_cfg, device)

    def in_float32(self) -> Clip:
        """A copy, with the weights rounded as they are here, that computes in float32: for rows that overflow in
        float16."""
        identity = replace(self.identity, precision="fp32")
        return type(self)(copy.deepcopy(self.model), self.tokenizer, identity, self.model_cfg, str(self.device))

    def parameter_counts(self) -> tuple[int, int]:
        """The number of parameters of both towers, and of the image tower alone."""
        model = self.model
        return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.visual.parameters())

    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def compile(self, batch_size: int) -> None:
        """Compile the image tower for batches of up to `batch_size`: the first batch takes minutes, the others less.

        CUDA graphs are not used: a batch keeps a GPU busy for fifty times as long as its kernels take to launch, and a
        graph belongs to the thread that recorded it.
        """
        self._encode_compiled = torch.compile(self.model.encode_image, dynamic=False)
        self._compiled_batch = batch_size

    @property
    def compiled(self) -> bool:
        """Whether the image tower was compiled; batches of images are then padded to the size it was compiled for."""
        return self._compiled_batch > 0

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W), preprocessed but not normalised, to unit-norm float32 (B, D) on the device."""
        facts, count = self.identity.preprocessing, len(pixels_B3HW)
        pixels_B3HW = self._transfer.send(pixels_B3HW)
        if count < self._compiled_batch:  # so that there is one shape, compiled once
            pixels_B3HW = F.pad(pixels_B3HW, (0, 0, 0, 0, 0, 0, 0, self._compiled_batch - count))
        with torch.inference_mode():
            images = normalise(pixels_B3HW, facts.mean, facts.std).to(self._dtype, memory_format=self._layout)
            encode = self._encode_compiled or self.model.encode_image
            features_BD = encode(images)[:count]
        return F.normalize(features_BD.float(), dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Sentences to unit-norm float32 (B, D) on the device; tokens beyond the context length are cut off."""
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Sentences to int64 (B, L), L the context length."""
        return self._tokenize(texts)

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Tokens to unit-norm float32 (B, D) on the device. Padding that all sentences share is left out, if the text
        tower does not look at padding."""
        if self._ignores_padding:
            tokens_BL = tokens_BL[:, : token_counts(tokens_BL).max()]
        return F.normalize(self._encode_tokens(tokens_BL).float(), dim=-1)

    def _encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        tokens_BL, length, model = self._transfer.send(tokens_BL), tokens_BL.shape[1], self.model
        # With fewer tokens than the context length, open_clip would still add the whole mask, and all positions
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
        """Whether a sentence has the same embedding without its padding, as it has with a causal mask or a mask of the
        padding. Found out by trying, in float32."""
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
        settings = (facts.tokenizer, facts.context_length, facts.activation, facts.precision)
        return hashlib.sha256(f"{digest_tensors(tower)} {settings}".encode()).hexdigest()


def _convert(model: Any, dtype: torch.dtype) -> Any:
    """Convert the model's weights and buffers to `dtype`, except those of batch norm."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module._apply(lambda value: value.to(dtype) if value.is_floating_point() else value, recurse=False)
    return model


class _Text(nn.Module):
    """A model whose forward is encode_text: functional_call calls nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens_BL)  # type: ignore[no-any-return]


def token_counts(tokens_BL: torch.Tensor) -> np.ndarray[Any, Any]:
    """The number of tokens of each sentence, int64 (B,). The equal tokens at its end are padding, and count
    as one: the end token may be the padding token too."""
    differs_BL = tokens_BL != tokens_BL[:, -1:]
    places_L = torch.arange(1, tokens_BL.shape[1] + 1)
    count_B: np.ndarray[Any, Any] = (differs_BL * places_L).amax(dim=1).numpy()
    return (count_B + 1).clip(max=tokens_BL.shape[1])


def teacher_precision(device: str) -> Precision:
    """The default precision of a teacher: fp16 on a GPU, fp32 on a CPU.

    The teacher runs once and its rounding is cached for good. bf16 is as fast, but 40 to 460 times further from fp32 in
    1 - cosine (`python -m benchmarks precision`). Rows that overflow in fp16 are computed again
    (caching/encode_rows.py).
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
    """Load a model by open_clip's names: an architecture and a tag or file, ``hf-hub:org/model``, ``local-dir:FOLDER``;
    or a vision-only one, ``timm:MODEL`` (models/vision_clip.py).

    If a file of weights or a folder's config does not describe the preprocessing, it comes from `trained`, which the
    user gives; else from `known`, the identity of these weights in a document; else from the tags that open_clip knows
    (models/pretraining.py). `precision` is that of the matrix products, by default `teacher_precision`.

    Raises TeacherError for an unknown name, missing weights, weights trained with another activation, weights whose
    preprocessing is not known, a model without a text tower, or one that could run code of its own (models/hub.py).
    """
    form = format_of(name.removeprefix(FOLDER)) if name.startswith(FOLDER) else None
    if form not in (None, "open_clip"):
        require_as_exported(name.removeprefix(FOLDER), form, device=device, precision=precision, trained=trained)
    device = "cpu" if form == "onnx" else choose_device(device)
    precision = precision or teacher_precision(device)
    name, pretrained = full_name(name, pretrained)
    if form == "onnx":
        from dimefm.models.onnx_clip import OnnxClip

        return OnnxClip(name.removeprefix(FOLDER), name, device)
    if form == "transformers":
        from dimefm.models.transformers_clip import load_transformers

        return load_transformers(name.removeprefix(FOLDER), name, precision, device)
    if name.startswith(TIMM):
        from dimefm.models.vision_clip import load_timm

        return load_timm(name, pretrained, trained or Trained(), precision, device)
    given, configured = trained or Trained(), name.startswith(CONFIGURED)
    if not configured:
        facts = facts_of_weights(
            name, pretrained or "", given, known
        )  # it may raise: better before a large file is loaded
    model = create_model(name, pretrained)
    if configured:
        facts = facts_of_config(name, given, known)
    model_cfg = open_clip.get_model_config(name)
    if not model_cfg or not hasattr(model, "encode_text"):
        raise TeacherError(f"{name} is not a two-tower CLIP model", remedy="use one with an image and a text tower")
    require_plain_tokenizer(name, model_cfg)
    if DECODER in model_cfg:
        model, model_cfg = without_decoder(model, model_cfg)
    preprocessing = replace(preprocessing_of(model), **facts.preprocessing)
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
    """A Clip around an open_clip model that is already built; its identity is read off the model itself."""
    tokenizer = open_tokenizer(name)
    identity = TeacherIdentity(
        name=name,
        pretrained=pretrained,
        weights=digest_weights(model),
        activation="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        preprocessing=preprocessing or preprocessing_of(model),
        tokenizer=_tokenizer_name(model_cfg, tokenizer),
        context_length=int(tokenizer.context_length),
        embed_dim=int(model_cfg["embed_dim"]),
        precision=precision,
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=None if getattr(model, "logit_bias", None) is None else float(model.logit_bias.detach()),
        preprocessing_from=preprocessing_from,
    )
    return Clip(model, tokenizer, identity, model_cfg, device)


def _tokenizer_name(model_cfg: dict[str, Any], tokenizer: Any) -> str:
    text_cfg = model_cfg["text_cfg"]
    named = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or type(tokenizer).__name__
    options = {k: text_cfg[k] for k in ("tokenizer_kwargs", "tokenizer_mode") if text_cfg.get(k)}
    return f"{named} {json.dumps(options, sort_keys=True)}" if options else str(named)


def digest_weights(model: nn.Module) -> str:
    """sha256 over the names, shapes and float32 values of all weights in order of name, as hex."""
    return digest_tensors(model.state_dict())


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The same digest of some tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
