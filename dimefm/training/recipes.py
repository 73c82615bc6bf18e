"""Recipes: functions that return a training config. `paper` is the authors'; the others are for the shipped sample.

Each takes any field of TrainConfig by name, to change it: ``paper(images, texts, out, student="resnet18", lr=1e-3)``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from dimefm.errors import TrainingError
from dimefm.system.near_names import did_you_mean
from dimefm.training.config import LossConfig, TextMix, TrainConfig


class Recipe(Protocol):
    """A config of three paths, in which `changes` are laid over the fields that the recipe sets. Another student than
    the recipe's has its own image size, unless `changes` have one. Raises TrainingError for a field that does not
    exist, and for values that make no sense."""

    def __call__(self, images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig: ...


def paper(images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig:
    """The authors' settings: ViT-B/32 from scratch for 100 epochs, by the losses vl and pvl.

    It has the numbers of their released code, and differs from that code in these points:

    - The batch is 5,120 images and texts, 640 for each of 8 GPUs. Theirs is 640 in all, which DataParallel spreads over
      all GPUs: `--batch-size 640 --texts-per-step 640` does the same.
    - Softmaxes are over the whole batch. So are theirs, over 640; but with several processes, as their README suggests,
      they would be over the part of each process.
    - The cosine begins where the warm-up ends. Theirs is timm's, which counts the warm-up as part of the cosine: rates
      here are higher by up to 2.8e-5, 3.5 % of the peak, in the middle of a run, and by less towards either end. Theirs
      are also set after the step that they are for, so that each is a step late.
    - Crops are taken from the image as it is. Theirs are taken after a resize to 256 pixels, and see the same areas.
    - Texts are drawn at random in each step; theirs go through a shuffled list. Images are shuffled in blocks
      (training/row_order.py); theirs one by one.
    - Logits and losses are float32; theirs are half precision, under autocast.
    """
    recipe = TrainConfig(
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
    return _changed(recipe, changes)


def best(images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig:
    """The recipe that won the comparison of docs/recipes.md: regression of the cached embedding, by Muon.

    Half of the loss is the cosine to the teacher's embedding, half the cosine after its mean is taken off both. The
    optimizer is Muon (Jordan et al. 2024), which turns each matrix of the update into an orthogonal one. No sentences
    are needed.

    It was found with a ResNet-10-T at 64 px and with timm's smallest ResNet at 48 px, in batches of 64 and 32, at up to
    160,000 images seen, from one small teacher; nothing larger has been tried. Another student (--student) sees images
    of its own size, unless --image-size says otherwise.
    """
    recipe = TrainConfig(
        images=images,
        texts=texts,
        out=out,
        student="resnet10t",
        image_size=64,
        epochs=10,
        batch_size=64,
        texts_per_step=2048,
        lr=0.02,
        min_lr=0.0,
        warmup_lr=1e-5,
        warmup_epochs=0.5,
        weight_decay=0.05,
        loss=LossConfig(vl=0.0, pvl=0.0, cosine=0.5, centred=0.5),
        text_mix=TextMix(),
        crop_scale=(0.6, 1.0),
        optimizer="muon",
    )
    return _changed(recipe, changes)


def best_vit(images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig:
    """The recipe best at a lower rate, for vision transformers: a ViT-B/32 at its own image size.

    At the rate of `best` a small ViT learned less than by AdamW, at this one more. It was found with a ViT of six
    layers, 192 wide, at 64 px (docs/recipes.md); nothing larger has been tried.
    """
    recipe = best(images, texts, out, student="ViT-B-32", lr=0.003)
    return _changed(recipe, changes)


def sample(images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig:
    """The recipe best for the shipped sample, in two minutes on two CPU cores.

    Its student is timm's smallest ResNet at 48 px, which sees four times as many images in that time as a ResNet-10
    (benchmarks/RESULTS.md). It uses one torch thread: the step of so small a student is no faster with two, and far
    slower beside a busy neighbour.
    """
    recipe = best(
        images,
        texts,
        out,
        student="test_resnet",
        image_size=48,
        batch_size=32,
        val_every=2.5,
        threads=1,
        checkpoint_every=500,
    )
    return _changed(recipe, changes)


def sample_paper(images: str, texts: str | None, out: str, **changes: Any) -> TrainConfig:
    """The paper's losses on the shipped sample, in two minutes on two CPU cores.

    They are vl and pvl as released, over many sentences per step, which are drawn from the visually grounded selection:
    `selection` must name it. As the authors it uses AdamW; all else is as in the recipe sample.
    """
    recipe = sample(
        images,
        texts,
        out,
        loss=LossConfig(vl=0.7, pvl=0.3),
        text_mix=TextMix(selected=1.0, random=0.0),
        optimizer="adamw",
        lr=8e-3,
    )
    return _changed(recipe, changes)


def _changed(recipe: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    for name in changes.keys() - TrainConfig.__dataclass_fields__.keys():
        near = did_you_mean(name, TrainConfig.__dataclass_fields__, "dimefm train-student --fields lists all")
        raise TrainingError(f"no field of TrainConfig is called {name!r}", remedy=near)
    own_size = {"image_size": None} if changes.get("student", recipe.student) != recipe.student else {}
    return replace(recipe, **{**own_size, **changes})


RECIPES: dict[str, Recipe] = {
    "paper": paper,
    "best": best,
    "best-vit": best_vit,
    "sample-paper": sample_paper,
    "sample": sample,
}
