"""Small training runs for tests: a tower of a few thousand parameters on the 96 real images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dimefm.store.embedding_store import Store
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.recipes import sample

STUDENT = "test_resnet"
STEPS = 8


def tiny_config(images: Store, texts: Store, out: Path, **changes: Any) -> TrainConfig:
    """Eight steps of 16 images at 32 px, with the paper's losses over 64 texts."""
    config = replace(
        sample(images.path, texts.path, str(out)),
        student=STUDENT,
        image_size=32,
        batch_size=16,
        texts_per_step=64,
        epochs=2,
        lr=4e-3,
        optimizer="adamw",
        max_steps=STEPS,
        loss=LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5),
        checkpoint_every=3,
        log_every=2,
        workers=0,
        precision="fp32",
    )
    return replace(config, **changes)


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    """The weights in a run's last checkpoint."""
    from dimefm.training.checkpoints import Checkpoints

    state = Checkpoints(str(run)).load()
    assert state is not None
    return dict(state["image"]["model"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
