"""What a student minimises: the weighted sum of losses, with the state that some of them have.

To add a loss: write the function in training/losses.py; give it a line in LOSSES below; and give LossConfig
(training/config.py) a field of its name, which is its weight and 0 by default, and the name in LossConfig.WEIGHTS. All
else follows from these: --loss takes it, the tests of the table call it, and it is logged under its name in
metrics.jsonl and TensorBoard, as every part that `Objective` returns is. If it draws on texts, on the sentence of each
image or on the mean embedding, say so where these are made ready: `_text_bank` in training/feed.py, and
training/build_towers.py; and name one that needs sentences in LossConfig.OF_TEXTS.

Shapes: B images of this process, G of all processes, T texts, Q images of the queue, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dimefm.training.config import MAX_SCALE, LossConfig
from dimefm.training.distributed import ALONE, Place, gather_batch
from dimefm.training.losses import (
    Queue,
    Scale,
    centred_loss,
    contrastive_loss,
    cosine_loss,
    pvl_loss,
    udist_loss,
    vl_loss,
)

Pair = tuple[torch.Tensor, torch.Tensor]
"""Embedding (G, D) and row (G,) of each image's own sentence."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """All that a loss may be computed from in a step. Embeddings are unit-norm, float32 or wider.

    `text_TD` are the step's texts, `pair` the embedding (G, D) and row (G,) of each image's own sentence, `mean_D` is
    the teacher's mean embedding; each is None where nothing needs it.
    """

    config: LossConfig
    teacher_GD: torch.Tensor
    student_BD: torch.Tensor
    text_TD: torch.Tensor | None = None
    pair: Pair | None = None
    mean_D: torch.Tensor | None = None
    scale: float = 100.0
    student_scale: Scale = 100.0
    queue: Queue | None = None
    place: Place = ALONE

    @property
    def teacher_BD(self) -> torch.Tensor:
        """The teacher's embeddings of this process's images."""
        return self.teacher_GD[self.place.rows]

    def of_scores(self, temperature: float) -> dict[str, Any]:
        """The keywords of the losses that compare softmaxes of scores."""
        return {
            "scale": self.scale, "student_scale": self.student_scale, "temperature": temperature, "queue": self.queue,
            "place": self.place,
        }  # fmt: skip

    def squared(self, temperature: float) -> float:
        """The factor of such a loss: T^2 with `square_temperature`."""
        return temperature**2 if self.config.square_temperature else 1.0


def _vl(inputs: LossInputs) -> torch.Tensor:
    if inputs.text_TD is None:
        raise ValueError("the vl loss needs text embeddings")
    temperature = inputs.config.vl_temperature
    value = vl_loss(inputs.teacher_BD, inputs.text_TD, inputs.student_BD, **inputs.of_scores(temperature))
    return value * inputs.squared(temperature)


def _pvl(inputs: LossInputs) -> torch.Tensor:
    temperature, mask = inputs.config.pvl_temperature, inputs.config.mask_diagonal
    value = pvl_loss(inputs.teacher_GD, inputs.student_BD, mask_diagonal=mask, **inputs.of_scores(temperature))
    return value * inputs.squared(temperature)


def _udist(inputs: LossInputs) -> torch.Tensor:
    temperature, mask = inputs.config.udist_temperature, inputs.config.mask_diagonal
    value = udist_loss(inputs.teacher_GD, inputs.student_BD, mask_diagonal=mask, **inputs.of_scores(temperature))
    return value * inputs.squared(temperature)


def _cosine(inputs: LossInputs) -> torch.Tensor:
    return cosine_loss(inputs.teacher_BD, inputs.student_BD)


def _centred(inputs: LossInputs) -> torch.Tensor:
    if inputs.mean_D is None:
        raise ValueError("the centred loss needs the mean embedding")
    return centred_loss(inputs.teacher_BD, inputs.student_BD, inputs.mean_D)


def _contrastive(inputs: LossInputs) -> torch.Tensor:
    if inputs.pair is None:
        raise ValueError("the contrastive loss needs pairs")
    return contrastive_loss(inputs.student_BD, *inputs.pair, scale=inputs.student_scale, place=inputs.place)


LOSSES: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "vl": _vl,
    "pvl": _pvl,
    "udist": _udist,
    "cosine": _cosine,
    "centred": _centred,
    "contrastive": _contrastive,
}
"""How each loss is computed, by its name in LossConfig.WEIGHTS. They raise ValueError for a lacking input."""


class Objective(torch.nn.Module):
    """The weighted sum of all losses with a weight. Its state is a learned logit scale and the queue."""

    def __init__(self, config: LossConfig, *, teacher_scale: float, dim: int, mean_D: torch.Tensor | None) -> None:
        """`mean_D` is the teacher's mean embedding, needed where `centred` has a weight."""
        super().__init__()
        self.config = config
        self.mean_D: torch.Tensor | None
        self.register_buffer("mean_D", mean_D, persistent=False)
        self.scale = teacher_scale if config.logit_scale == "teacher" else config.scale
        self.log_scale: torch.nn.Parameter | None = None
        if config.logit_scale == "learned":
            self.log_scale = torch.nn.Parameter(torch.tensor(math.log(config.scale)))
        self._queued = 0  # rows that have gone into the queue until now
        self.teacher_QD: torch.Tensor
        self.student_QD: torch.Tensor
        if config.queue:
            self.register_buffer("teacher_QD", torch.zeros(config.queue, dim))
            self.register_buffer("student_QD", torch.zeros(config.queue, dim))

    def unit(self, features_BD: torch.Tensor) -> torch.Tensor:
        """The embeddings that the losses compare: features (B, D) of a tower, set to unit norm."""
        return F.normalize(features_BD, dim=-1)

    def forward(
        self,
        teacher_GD: torch.Tensor,
        student_BD: torch.Tensor,
        text_TD: torch.Tensor | None = None,
        pair: Pair | None = None,
        place: Place = ALONE,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and each of its parts unweighted and detached. Both are this process's part of those of all
        processes, see training/losses.py. All parts are logged under these names.

        For `text_TD` and `pair` see LossInputs. Raises ValueError where a loss lacks one of them.
        """
        student_scale = self.scale if self.log_scale is None else self.log_scale.exp()
        inputs = LossInputs(
            config=self.config, teacher_GD=teacher_GD, student_BD=student_BD, text_TD=text_TD, pair=pair,
            mean_D=self.mean_D, scale=self.scale, student_scale=student_scale, queue=self._queue(), place=place,
        )  # fmt: skip
        weights = {name: getattr(self.config, name) for name in LossConfig.WEIGHTS}
        parts = {name: LOSSES[name](inputs) for name, weight in weights.items() if weight}
        if not parts:
            raise ValueError("every loss has weight 0")
        total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        shown = {name: value.detach() for name, value in parts.items()}
        if self.log_scale is not None:
            shown["logit_scale"] = self.log_scale.detach().exp()
        return total, shown

    @torch.no_grad()
    def after_step(self, teacher_GD: torch.Tensor, student_BD: torch.Tensor, place: Place = ALONE) -> None:
        """Hold a learned scale within its bounds; put the step's rows into the queue, over the oldest."""
        if self.log_scale is not None:
            self.log_scale.clamp_(0, math.log(MAX_SCALE))
        if not self.config.queue:
            return
        student_GD = gather_batch(student_BD, place)
        size = min(len(teacher_GD), self.config.queue)
        row = (self._queued + torch.arange(size, device=self.teacher_QD.device)) % self.config.queue
        self.teacher_QD[row] = teacher_GD[-size:].to(self.teacher_QD)
        self.student_QD[row] = student_GD[-size:].to(self.student_QD)
        self._queued += size

    def get_extra_state(self) -> int:
        """The part of the state that is not a tensor."""
        return self._queued

    def set_extra_state(self, state: int) -> None:
        """Take what `get_extra_state` gave."""
        self._queued = state

    def _queue(self) -> Queue | None:
        if not self.config.queue:
            return None
        filled = min(self._queued, self.config.queue)
        return self.teacher_QD[:filled], self.student_QD[:filled]
