"""The towers that a run trains, each with its objective: the image tower, and the text tower of a student that has one.

Shapes: D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cache_schemas import Run
from dimefm.errors import TrainingError
from dimefm.images.preprocess import normalise
from dimefm.models.first_weights import load_first_weights
from dimefm.models.tower_training import checkpoint_gradients, drop_patches
from dimefm.models.towers import build_student, build_text_student, widened
from dimefm.store.embedding_store import Store
from dimefm.training.batch_norm import batch_norms
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.mean_embedding import mean_embedding
from dimefm.training.objective import Objective
from dimefm.training.run_folder import Inputs
from dimefm.training.several_teachers import SeveralObjectives
from dimefm.training.tower_trainer import TowerTrainer

_Rows = np.ndarray[Any, Any]


def build_towers(
    config: TrainConfig, run: Run, inputs: Inputs, place: Place, only: Mapping[str, _Rows | None], *, resumed: bool
) -> dict[str, TowerTrainer]:
    """The towers of `run`, "image" and perhaps "text"; `only` are the rows that each draws, if not all. Their weights
    are random, or for the image tower those of `config.init`, unless the run is `resumed`: then a checkpoint has them.
    """
    if run.centred_on == "stored":
        only = {}

    def trainer(module: Any, objective: Objective | SeveralObjectives, prepare: Any) -> TowerTrainer:
        return TowerTrainer(
            module, objective, place, prepare=prepare, precision=config.precision,
            accumulate=config.accumulate, ema=config.ema, compile=config.compile,
            batch_norm=config.batch_norm or "sync", recomputes=config.gradient_checkpointing,
        )  # fmt: skip

    spec = run.student
    image = _image_tower(config, run, resumed=resumed)
    together = place.world if config.batch_norm == "local" else 1
    if config.batch_size // together // config.accumulate == 1 and config.batch_norm != "frozen":
        _require_more_than_one(image, spec.image_size)
    if config.patch_dropout:
        drop_patches(image, spec.name, config.patch_dropout)
    prepare = partial(normalise, mean=spec.mean, std=spec.std)
    towers = {"image": trainer(image, _image_objective(config, inputs, only.get("image")), prepare)}
    if run.text_student:
        text = build_text_student(run.text_student)
        towers["text"] = trainer(
            text, _objective(config.text_loss, inputs.texts, only.get("text")), lambda tokens: tokens
        )
    if config.gradient_checkpointing:
        for name, module in named_modules(config, towers).items():
            checkpoint_gradients(module, name)
    return towers


def named_modules(config: TrainConfig, towers: dict[str, TowerTrainer]) -> dict[str, Any]:
    """The modules of towers by the names of their models."""
    names = {"image": config.student, "text": f"the text tower of {config.text_student}"}
    return {names[side]: tower.module for side, tower in towers.items()}


def _image_tower(config: TrainConfig, run: Run, *, resumed: bool) -> Any:
    """The image tower. With several teachers all but the further projections begins as with the first teacher alone."""
    if resumed:
        return build_student(run.student)
    first = replace(run.student, embed_dim=run.teacher.embed_dim)
    image = build_student(first)
    if config.batch_norm == "frozen" and not batch_norms(image):
        raise TrainingError(f"{first.name} has no batch norm to be frozen", remedy="leave batch_norm out")
    if config.init:
        load_first_weights(image, first, config.init)
    return widened(image, run.student) if run.more_teachers else image


def _image_objective(config: TrainConfig, inputs: Inputs, only: _Rows | None) -> Objective | SeveralObjectives:
    stores = [one.images for one in inputs.teachers]
    losses = [loss for loss in config.teacher_losses() if loss]
    objectives = [_objective(loss, store, only) for loss, store in zip(losses, stores, strict=True)]
    if not inputs.more:
        return objectives[0]
    weights = config.teacher_weights or (1.0,) * len(stores)
    return SeveralObjectives(objectives, [store.schema.dim for store in stores], weights)


def _objective(loss: LossConfig, store: Store | None, only: _Rows | None) -> Objective:
    """The losses on the embeddings of a store, of which `only` these rows are drawn."""
    assert store
    teacher, mean_D = store.schema.teacher, mean_embedding(store, only) if loss.centred else None
    return Objective(loss, teacher_scale=teacher.logit_scale, dim=teacher.embed_dim, mean_D=mean_D)


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
