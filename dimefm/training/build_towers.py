"""The towers that a run trains, each with its objective: the image tower, and the text tower of a student that has one.

Shapes: D embedding width.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from cache_schemas import Run
from dimefm.errors import TrainingError
from dimefm.images.preprocess import normalise
from dimefm.models.first_weights import load_first_weights
from dimefm.models.tower_training import checkpoint_gradients, drop_patches
from dimefm.models.towers import build_student, build_text_student
from dimefm.training.batch_norm import batch_norms
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.mean_embedding import mean_embedding
from dimefm.training.objective import Objective
from dimefm.training.run_folder import Inputs
from dimefm.training.tower_trainer import TowerTrainer


def build_towers(
    config: TrainConfig, run: Run, inputs: Inputs, place: Place, *, resumed: bool
) -> dict[str, TowerTrainer]:
    """The towers of `run`, "image" and perhaps "text". Their weights are random, or for the image tower those of
    `config.init`, unless the run is `resumed`: then a checkpoint has them."""

    def trainer(module: Any, loss: LossConfig, mean_D: torch.Tensor | None, prepare: Any) -> TowerTrainer:
        teacher = inputs.images.schema.teacher
        objective = Objective(loss, teacher_scale=teacher.logit_scale, dim=teacher.embed_dim, mean_D=mean_D)
        return TowerTrainer(
            module, objective, place, prepare=prepare, precision=config.precision,
            accumulate=config.accumulate, ema=config.ema, compile=config.compile,
            batch_norm=config.batch_norm or "sync", recomputes=config.gradient_checkpointing,
        )  # fmt: skip

    image, spec = build_student(run.student), run.student
    if config.batch_norm == "frozen" and not batch_norms(image):
        raise TrainingError(f"{spec.name} has no batch norm to be frozen", remedy="leave batch_norm out")
    together = place.world if config.batch_norm == "local" else 1
    if config.batch_size // together // config.accumulate == 1 and config.batch_norm != "frozen":
        _require_more_than_one(image, spec.image_size)
    if config.init and not resumed:
        load_first_weights(image, spec, config.init)
    if config.patch_dropout:
        drop_patches(image, spec.name, config.patch_dropout)
    mean_D = mean_embedding(inputs.images) if config.loss.centred else None
    towers = {"image": trainer(image, config.loss, mean_D, partial(normalise, mean=spec.mean, std=spec.std))}
    if run.text_student:
        mean_D = mean_embedding(inputs.texts) if config.text_loss.centred else None
        text = build_text_student(run.text_student)
        towers["text"] = trainer(text, config.text_loss, mean_D, lambda tokens: tokens)
    if config.gradient_checkpointing:
        for name, module in named_modules(config, towers).items():
            checkpoint_gradients(module, name)
    return towers


def named_modules(config: TrainConfig, towers: dict[str, TowerTrainer]) -> dict[str, Any]:
    """The modules of towers by the names of their models."""
    names = {"image": config.student, "text": f"the text tower of {config.text_student}"}
    return {names[side]: tower.module for side, tower in towers.items()}


def _require_more_than_one(tower: Any, size: int) -> None:
    """Raises TrainingError for a tower with batch norm that cannot train on one image at a time: where its last map has
    one place, one image has no variance."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            copy.deepcopy(tower).train()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            what = f"a batch, or a pass of it, of one image of {size} px cannot be trained on, as the student has batch"
            remedy = "give a larger --batch-size, a smaller --accumulate, or a larger --image-size"
            raise TrainingError(f"{what} norm: {error}", remedy=remedy) from error
