"""Recipes: functions that return a training config. `paper` is the authors'; the others are for the shipped sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dimefm.config import TrainConfig
from dimefm.objective import LossConfig
from dimefm.textbank import TextMix


def paper(images: str, texts: str, out: str) -> TrainConfig:
    """The released recipe: ViT-B/32 from scratch, 100 epochs, vl and pvl; 640 images on each of 8 GPUs, as many texts.

    Its crops are taken from the image as it is, not from one first resized to 256 pixels, which sees the same areas.
    """
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
    )


def sample(images: str, texts: str, out: str) -> TrainConfig:
    """What gives the best student of those tried from the shipped sample, in about six minutes on two CPU cores.

    At this budget the paper's losses are far from the best: a small student that has seen 150 thousand images is better
    served by regression of the centred embedding alone (benchmarks/RESULTS.md).
    """
    return TrainConfig(
        images=images,
        texts=texts,
        out=out,
        student="resnet10t",
        image_size=64,
        epochs=30,
        batch_size=64,
        texts_per_step=2048,
        lr=4e-3,
        min_lr=0.0,
        warmup_lr=1e-5,
        warmup_epochs=1.5,
        weight_decay=0.05,
        loss=LossConfig(vl=0.0, pvl=0.0, centred=1.0),
        text_mix=TextMix(),
        crop_scale=(0.6, 1.0),
        val_every=5,
        checkpoint_every=500,
    )


def sample_paper(images: str, texts: str, out: str) -> TrainConfig:
    """The paper's objective on the shipped sample: vl and pvl as released, over many texts a step, drawn from the
    visually grounded selection (which `selection` must name). Two minutes on two CPU cores."""
    return replace(
        sample(images, texts, out),
        epochs=10,
        batch_size=32,
        texts_per_step=2048,
        lr=8e-3,
        warmup_epochs=0.5,
        loss=LossConfig(vl=0.7, pvl=0.3),
        text_mix=TextMix(selected=1.0, random=0.0),
    )


RECIPES: dict[str, Callable[[str, str, str], TrainConfig]] = {
    "paper": paper, "sample-paper": sample_paper, "sample": sample,
}  # fmt: skip
