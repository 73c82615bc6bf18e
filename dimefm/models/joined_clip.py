"""Students of one run with the text towers of several teachers, as one model: their embeddings side by side.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dimefm.models.clip import Clip


class JoinedClip(Clip):
    """Its cosine of an image and a sentence is the weighted mean of the cosines of its models: embeddings are put side
    by side, each times the square root of its share of the weights. The models prepare images alike."""

    def __init__(self, clips: Sequence[Clip], weights: Sequence[float], name: str) -> None:
        self._clips = list(clips)
        self._shares = [weight / sum(weights) for weight in weights]
        facts = [clip.identity for clip in clips]
        identity = replace(
            facts[0],
            name=name,
            pretrained=None,
            weights=_digest(self._shares, [one.weights for one in facts]),
            tokenizer=" and ".join(one.tokenizer for one in facts),
            context_length=sum(one.context_length for one in facts),
            embed_dim=sum(one.embed_dim for one in facts),
            logit_scale=sum(share * one.logit_scale for share, one in zip(self._shares, facts, strict=True)),
            logit_bias=None,
        )
        empty = nn.Module()
        empty.visual = nn.Module()
        super().__init__(empty, None, identity, {"embed_dim": identity.embed_dim}, str(clips[0].device))

    def on(self, device: str) -> Clip:
        return JoinedClip([clip.on(device) for clip in self._clips], self._shares, self.identity.name)

    def in_float32(self) -> Clip:
        return JoinedClip([clip.in_float32() for clip in self._clips], self._shares, self.identity.name)

    def parameter_counts(self) -> tuple[int, int]:
        wholes, images = zip(*(clip.parameter_counts() for clip in self._clips), strict=True)
        return sum(wholes), sum(images)

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self._beside([clip.encode_images(pixels_B3HW) for clip in self._clips])

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Sentences to int64 (B, L), the tokens of all models one after the other."""
        return torch.cat([clip.tokenize(texts) for clip in self._clips], dim=1)

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        parts = tokens_BL.split([clip.identity.context_length for clip in self._clips], dim=1)
        return self._beside([clip.encode_tokens(part) for clip, part in zip(self._clips, parts, strict=True)])

    def text_digest(self) -> str:
        return _digest(self._shares, [clip.text_digest() for clip in self._clips])

    def _beside(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([math.sqrt(share) * part for share, part in zip(self._shares, parts, strict=True)], dim=1)


def _digest(shares: Sequence[float], digests: Sequence[str]) -> str:
    return hashlib.sha256(f"{shares} {digests}".encode()).hexdigest()
