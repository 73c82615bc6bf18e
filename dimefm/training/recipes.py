"""Recipes: functions that return a training config. `paper` is the authors'; the others are for the shipped sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dimefm.training.config import LossConfig, TextMix, TrainConfig


def paper(images: str, texts: str, out: str) -> TrainConfig:
    """ViT-B/32 from scratch, 100 epochs, vl and pvl, with the numbers of the authors' released code. It differs from
    that code in these:

    - The batch is 5,120 images and texts, 640 for each of 8 GPUs. The released code has 640 in all, which DataParallel
      spreads over the GPUs there are: `--batch-size 640 --texts-per-step 640` is that.
    - Softmaxes are over the whole batch. So they are there, with its 640; were it extended to several processes, as its
      README suggests, they would be over each process's own.
    - The cosine begins where the warm-up ends. Theirs is timm's, which counts the warm-up as part of it: rates here are
      higher by up to 2.8e-5, 3.5 % of the peak, in mid-run, and less towards either end. Theirs are set after each
      step, to what the schedule has for that step: all are a step late.
    - Crops are taken from the image as it is, not from one first resized to 256 pixels, which sees the same areas.
    - Texts are drawn at random in each step, theirs go through a shuffled list; images are shuffled in blocks
      (dimefm.training.row_order), theirs one by one.
    - Logits and losses are float32, theirs half precision under autocast.
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
    """The best student of those tried from the shipped sample in two minutes on two CPU cores, without AMX too.

    It is timm's smallest ResNet at 48 px, which sees four times the images that a ResNet-10 sees in that time, and it
    regresses the cached embeddings: at this budget that beats the paper's losses (benchmarks/RESULTS.md). One torch
    thread, since a step of so small a student has too little to share: with two it is no faster, and far slower beside
    a busy neighbour.
    """
    return TrainConfig(
        images=images,
        texts=texts,
        out=out,
        student="test_resnet",
        image_size=48,
        epochs=12,
        batch_size=32,
        texts_per_step=2048,
        lr=8e-3,
        min_lr=0.0,
        warmup_lr=1e-5,
        warmup_epochs=0.6,
        weight_decay=0.05,
        loss=LossConfig(vl=0.0, pvl=0.0, cosine=1.0),
        text_mix=TextMix(),
        crop_scale=(0.6, 1.0),
        val_every=3,
        threads=1,
        checkpoint_every=500,
    )


def sample_paper(images: str, texts: str, out: str) -> TrainConfig:
    """The paper's objective on the shipped sample: vl and pvl as released, over many texts a step, drawn from the
    visually grounded selection (which `selection` must name). Two minutes on two CPU cores."""
    return replace(
        sample(images, texts, out),
        epochs=10,
        warmup_epochs=0.5,
        loss=LossConfig(vl=0.7, pvl=0.3),
        text_mix=TextMix(selected=1.0, random=0.0),
    )


RECIPES: dict[str, Callable[[str, str, str], TrainConfig]] = {
    "paper": paper, "sample-paper": sample_paper, "sample": sample,
}  # fmt: skip
