"""Recipes: functions that return a training config. `paper` is the authors'; the others are for the shipped sample."""

from __future__ import annotations

from collections.abc import Callable

from dimefm.config import TrainConfig
from dimefm.losses import LossConfig
from dimefm.textbank import TextMix


def paper(images: str, texts: str, out: str) -> TrainConfig:
    """The released recipe: ViT-B/32 from scratch, 100 epochs, vl and pvl. Batch: 640 images on each of 8 GPUs."""
    return TrainConfig(
        images=images,
        texts=texts,
        out=out,
        student="ViT-B-32",
        epochs=100,
        batch_size=5120,
        texts_per_step=5120,
        lr=8e-4,
        min_lr=4e-5,
        warmup_lr=4e-6,
        warmup_epochs=4,
        weight_decay=0.05,
        loss=LossConfig(vl=0.7, pvl=0.3),
        text_mix=TextMix(),
        crop_scale=(0.08, 1.0),
        precision="bf16",
    )


def sample(images: str, texts: str, out: str) -> TrainConfig:
    """What gives the best student from the shipped sample in about six minutes on two CPU cores."""
    return TrainConfig(
        images=images,
        texts=texts,
        out=out,
        student="resnet10t",
        image_size=64,
        epochs=14,
        batch_size=128,
        texts_per_step=2048,
        lr=2e-3,
        min_lr=0.0,
        warmup_lr=1e-5,
        warmup_epochs=1,
        weight_decay=0.05,
        loss=LossConfig(vl=0.0, pvl=0.0, cosine=1.0),
        text_mix=TextMix(),
        crop_scale=(0.35, 1.0),
        precision="bf16",
    )


RECIPES: dict[str, Callable[[str, str, str], TrainConfig]] = {"paper": paper, "sample": sample}
