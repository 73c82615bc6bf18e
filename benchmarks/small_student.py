"""The student of several comparisons: a ResNet-10-T at 64 px, as the recipe of the sample was when they were made."""

from dataclasses import replace

from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.recipes import sample


def resnet10(images: str, texts: str, out: str) -> TrainConfig:
    """30 epochs in batches of 64, regression of the centred embedding."""
    return replace(
        sample(images, texts, out), student="resnet10t", image_size=64, epochs=30, batch_size=64, lr=4e-3,
        optimizer="adamw",
        warmup_epochs=1.5, val_every=5, loss=LossConfig(vl=0, pvl=0, centred=1),
    )  # fmt: skip
