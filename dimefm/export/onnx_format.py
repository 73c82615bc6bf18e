"""The ONNX format: each tower as a graph with a dynamic batch, made by torch's exporter and run by onnxruntime.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cache_schemas import Preprocessing
from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, ImageInput, OnnxFacts
from dimefm.errors import DimefmError
from dimefm.export.config import ExportConfig
from dimefm.export.formats import Written
from dimefm.export.onnx_graph import DATA, OPSET, write_graph
from dimefm.models.clip import Clip
from dimefm.system import storage

_LOGITS = "logit_scale * image_embeds @ text_embeds.T"


def write(clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written:
    """See formats.Writer."""
    facts, half = clip.identity, config.precision == "fp16"
    shared = _shared_facts(clip)
    pixels = torch.zeros(2, 3, *facts.preprocessing.size, dtype=getattr(torch, config.image_input))
    tokens = clip.tokenize(["a photo", "of a cat"])
    towers: dict[str, tuple[nn.Module, torch.Tensor, tuple[str, str], str, dict[str, str]]] = {
        "image": (
            ImageGraph(clip.model, facts.preprocessing, config.image_input),
            pixels,
            ("pixel_values", "image_embeds"),
            IMAGE_ONNX,
            _image_facts(clip, config),
        ),
        "text": (TextGraph(clip.model), tokens, ("input_ids", "text_embeds"), TEXT_ONNX, _text_facts(clip)),
    }
    for kind, (module, example, names, file, own) in towers.items():
        try:
            write_graph(module, example, folder / file, names=names, facts={**shared, **own}, half=half)
        except DimefmError as error:
            what = f"the {kind} tower of {config.source}: {error.what}"
            raise DimefmError(what, remedy="give --format open_clip") from error
    quantized = {}
    if config.int8:
        from dimefm.export.int8 import quantize  # it imports onnxruntime's quantizer, which other exports do without

        quantized = quantize(folder, clip, config)
    image_digest, text_digest = (digest_graph(folder / file) for file in (IMAGE_ONNX, TEXT_ONNX))
    weights = hashlib.sha256(f"{image_digest} {text_digest}".encode()).hexdigest()
    onnx = OnnxFacts(opset=OPSET, image_input=config.image_input, quantized=quantized)
    return Written(weights=weights, text_tower=text_digest, onnx=onnx)


def digest_graph(path: Path) -> str:
    """sha256 of a graph, and of its weights if they are apart."""
    data = path.with_name(f"{path.name}{DATA}")
    digest = storage.digest_file(str(path))
    if data.exists():
        digest = hashlib.sha256(f"{digest} {storage.digest_file(str(data))}".encode()).hexdigest()
    return digest


def _shared_facts(clip: Clip) -> dict[str, str]:
    facts = clip.identity
    found = {"embed_dim": facts.embed_dim, "logit_scale": facts.logit_scale, "logits": _LOGITS}
    if facts.logit_bias is not None:
        found |= {"logit_bias": facts.logit_bias, "logits": f"{_LOGITS} + logit_bias"}
    return {name: str(value) for name, value in found.items()}


def _image_facts(clip: Clip, config: ExportConfig) -> dict[str, str]:
    if config.image_input == "uint8":
        pixels = "uint8 RGB (batch, 3, height, width), 0 to 255, resized and cropped; the graph normalises them"
    else:
        pixels = "float32 RGB (batch, 3, height, width), resized and cropped, then (pixel / 255 - mean) / std"
    preprocessing: dict[str, Any] = asdict(clip.identity.preprocessing)
    return {"pixel_values": pixels, "preprocessing": json.dumps(preprocessing)}


def _text_facts(clip: Clip) -> dict[str, str]:
    facts = clip.identity
    tokens = f"int64 (batch, {facts.context_length}), by tokenizer.json"
    return {"input_ids": tokens, "context_length": str(facts.context_length), "tokenizer": facts.tokenizer}


class ImageGraph(nn.Module):
    """Pixels (B, 3, H, W) to unit-norm embeddings (B, D); uint8 pixels are normalised first."""

    def __init__(self, model: Any, preprocessing: Preprocessing, image_input: ImageInput) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self._model, self._image_input = model, image_input
        self.register_buffer("mean", torch.tensor(preprocessing.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocessing.std)[:, None, None])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self._image_input == "uint8":
            pixel_values = (pixel_values.float() / 255 - self.mean) / self.std
        return F.normalize(self._model.encode_image(pixel_values), dim=-1)


class TextGraph(nn.Module):
    """Tokens (B, L) to unit-norm embeddings (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._model.encode_text(input_ids), dim=-1)
