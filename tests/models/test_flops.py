"""Floating-point operations: against published numbers of multiply-adds, and by hand on a tiny model."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from dimefm.models.clip import Clip
from dimefm.models.flops import count_flops, flops_of
from tests.tiny_clip import CONFIG


def test_of_a_tiny_clip_as_counted_by_hand(clip: Clip) -> None:
    """Attention is in it, which the fused kernels of a CPU hide from torch's counter."""
    vision, text = CONFIG["vision_cfg"], CONFIG["text_cfg"]

    def layers(length: int, width: int) -> int:
        """Multiply-adds of a block: four projections, two products of attention, two layers of four times the width."""
        return length * width * width * (4 + 8) + 2 * length * length * width

    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = patches * 3 * vision["patch_size"] ** 2 * vision["width"] + layers(patches + 1, vision["width"])
    image += vision["width"] * clip.identity.embed_dim
    sentence = layers(text["context_length"], text["width"]) + text["width"] * clip.identity.embed_dim
    assert count_flops(clip) == (2 * image, 2 * sentence)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image", "text"), [("ViT-B-32", 4.41, 2.98), ("ViT-L-14", 81.0, 6.65), ("RN50", 6.12, 2.98)]
)
def test_of_published_models(name: str, image: float, text: float) -> None:
    """Billions of multiply-adds, as they are commonly given for these models."""
    model: Any = open_clip.create_model(name, load_weights=False).eval()
    side = model.visual.image_size
    pixels = torch.zeros(1, 3, *((side, side) if isinstance(side, int) else side))
    with torch.no_grad():
        found = [
            flops_of(lambda: model.encode_image(pixels)),
            flops_of(lambda: model.encode_text(torch.zeros(1, 77).long())),
        ]
    assert [one / 2e9 for one in found] == pytest.approx([image, text], rel=0.015)


def test_of_a_resnet() -> None:
    """torchvision gives 1.81 billion multiply-adds for resnet18 at 224 px."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet18").eval()
        pixels = torch.zeros(1, 3, 224, 224)
    assert flops_of(lambda: model(pixels)) / 2e9 == pytest.approx(1.81, rel=0.005)
