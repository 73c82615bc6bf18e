"""The ONNX format: each tower as a graph with a dynamic batch, made by torch's exporter and run by onnxruntime.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, OnnxFacts
from dimefm.export.config import ExportConfig
from dimefm.export.formats import Written
from dimefm.models.clip import Clip

OPSET = 18


def write(clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written:
    """See formats.Writer."""
    height, width = clip.identity.preprocessing.size
    image = _Image(clip, config.image_input == "uint8")
    pixels = torch.zeros(2, 3, height, width, dtype=getattr(torch, config.image_input))
    _export(image, pixels, "pixel_values", "image_embeds", folder / IMAGE_ONNX)
    _export(_Text(clip), clip.tokenize(["a photo", "of a cat"]), "input_ids", "text_embeds", folder / TEXT_ONNX)
    image_digest, text_digest = (
        hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (IMAGE_ONNX, TEXT_ONNX)
    )
    weights = hashlib.sha256(f"{image_digest} {text_digest}".encode()).hexdigest()
    facts = OnnxFacts(opset=OPSET, image_input=config.image_input, quantized={})
    return Written(weights=weights, text_tower=text_digest, onnx=facts)


def _export(module: nn.Module, example: torch.Tensor, name: str, output: str, path: Path) -> None:
    program: Any = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[name],
        output_names=[output],
        opset_version=OPSET,
        optimize=True,
        verbose=False,
    )
    program.save(str(path), external_data=False)


class _Image(nn.Module):
    """Pixels (B, 3, H, W) to unit-norm embeddings (B, D); uint8 pixels are normalised first."""

    def __init__(self, clip: Clip, from_bytes: bool) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self._model, self._from_bytes = clip.model, from_bytes
        facts = clip.identity.preprocessing
        self.register_buffer("mean", torch.tensor(facts.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(facts.std)[:, None, None])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self._from_bytes:
            pixel_values = (pixel_values.float() / 255 - self.mean) / self.std
        return F.normalize(self._model.encode_image(pixel_values), dim=-1)


class _Text(nn.Module):
    """Tokens (B, L) to unit-norm embeddings (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self._model = clip.model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._model.encode_text(input_ids), dim=-1)
