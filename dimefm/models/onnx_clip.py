"""An ONNX export as a Clip: all that works with a model works with what is shipped.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dimefm.models.clip import Clip
from dimefm.models.exported import require_as_exported, require_whole
from dimefm.models.onnx_towers import OnnxTowers


class OnnxClip(Clip):
    """An ONNX export, which onnxruntime computes on the CPU. Its precision is that of its graphs."""

    def __init__(self, folder: str, name: str, device: str) -> None:
        """Raises TeacherError for another device than the CPU, or a folder that cannot be loaded, StoreError for one
        that is not as it was written."""
        require_as_exported(folder, "onnx", device=device)
        self.towers = OnnxTowers(folder)
        require_whole(folder, self.towers.export)  # else results would be kept under the name of other weights
        identity = replace(self.towers.export.model, name=name)
        empty = nn.Module()
        empty.visual = nn.Module()
        super().__init__(empty, _Tokens(self.towers), identity, {"embed_dim": identity.embed_dim}, device)

    def on(self, device: str) -> Clip:
        return self if device == "cpu" else OnnxClip(self.towers.folder, self.identity.name, device)

    def in_float32(self) -> Clip:
        return self

    def parameter_counts(self) -> tuple[int, int]:
        return self.towers.export.parameters, self.towers.export.image_parameters

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.towers.encode_images(pixels_B3HW.numpy()))

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.towers.encode_tokens(tokens_BL.numpy()))

    def text_digest(self) -> str:
        return self.towers.export.text_tower


class _Tokens:
    """The tokenizer of an ONNX export, with tensors as open_clip's tokenizers give them."""

    def __init__(self, towers: OnnxTowers) -> None:
        self._towers, self.context_length = towers, towers.export.model.context_length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Sentences to int64 (B, L)."""
        return torch.from_numpy(self._towers.tokenize(texts))
