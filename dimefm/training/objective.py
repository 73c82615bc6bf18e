"""What a student minimises: the weighted sum of losses, with the state that some of them have.

Shapes: B images of this process, G of all processes, T texts, Q images of the queue, D embedding width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dimefm.training.config import MAX_SCALE, LossConfig
from dimefm.training.distributed import ALONE, Place, gather_batch
from dimefm.training.losses import centred_loss, contrastive_loss, cosine_loss, pvl_loss, udist_loss, vl_loss


class Objective(torch.nn.Module):
    """The weighted sum of all losses with a weight. Its state is a learned logit scale and the queue."""

    def __init__(self, config: LossConfig, *, teacher_scale: float, dim: int, mean_D: torch.Tensor | None) -> None:
        """`mean_D` is the mean teacher embedding, wanted where `centred` has a weight."""
        super().__init__()
        self.config = config
        self.mean_D: torch.Tensor | None
        self.register_buffer("mean_D", mean_D, persistent=False)
        self.scale = teacher_scale if config.logit_scale == "teacher" else config.scale
        self.log_scale: torch.nn.Parameter | None = None
        if config.logit_scale == "learned":
            self.log_scale = torch.nn.Parameter(torch.tensor(math.log(config.scale)))
        self._queued = 0  # rows that the queue has been given until now
        self.teacher_QD: torch.Tensor
        self.student_QD: torch.Tensor
        if config.queue:
            self.register_buffer("teacher_QD", torch.zeros(config.queue, dim))
            self.register_buffer("student_QD", torch.zeros(config.queue, dim))

    def forward(
        self,
        teacher_GD: torch.Tensor,
        student_BD: torch.Tensor,
        text_TD: torch.Tensor | None = None,
        pair: tuple[torch.Tensor, torch.Tensor] | None = None,
        place: Place = ALONE,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and each part unweighted and detached: this process's part of them, see dimefm.training.losses. All
        embeddings unit-norm, float32 or wider.

        `text_TD` is wanted by vl, and `pair`, the embedding (G, D) and row (G,) of each image's own sentence, by
        contrastive. Raises ValueError where one is missing.
        """
        config, teacher_BD = self.config, teacher_GD[place.rows]
        student_scale = self.scale if self.log_scale is None else self.log_scale.exp()
        shared: dict[str, Any] = {
            "scale": self.scale, "student_scale": student_scale, "queue": self._queue(), "place": place
        }  # fmt: skip
        masked: dict[str, Any] = {"mask_diagonal": config.mask_diagonal}
        parts: dict[str, torch.Tensor] = {}
        if config.vl:
            if text_TD is None:
                raise ValueError("the vl loss needs text embeddings")
            value = vl_loss(teacher_BD, text_TD, student_BD, temperature=config.vl_temperature, **shared)
            parts["vl"] = value * self._factor(config.vl_temperature)
        if config.pvl:
            value = pvl_loss(teacher_GD, student_BD, temperature=config.pvl_temperature, **shared, **masked)
            parts["pvl"] = value * self._factor(config.pvl_temperature)
        if config.udist:
            value = udist_loss(teacher_GD, student_BD, temperature=config.udist_temperature, **shared, **masked)
            parts["udist"] = value * self._factor(config.udist_temperature)
        if config.cosine:
            parts["cosine"] = cosine_loss(teacher_BD, student_BD)
        if config.centred:
            if self.mean_D is None:
                raise ValueError("the centred loss needs the mean embedding")
            parts["centred"] = centred_loss(teacher_BD, student_BD, self.mean_D)
        if config.contrastive:
            if pair is None:
                raise ValueError("the contrastive loss needs pairs")
            parts["contrastive"] = contrastive_loss(student_BD, *pair, scale=student_scale, place=place)
        if not parts:
            raise ValueError("every loss has weight 0")
        total = torch.stack([getattr(config, name) * value for name, value in parts.items()]).sum()
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
        """What beside tensors belongs to the state."""
        return self._queued

    def set_extra_state(self, state: int) -> None:
        """What `get_extra_state` gave."""
        self._queued = state

    def _queue(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.config.queue:
            return None
        filled = min(self._queued, self.config.queue)
        return self.teacher_QD[:filled], self.student_QD[:filled]

    def _factor(self, temperature: float) -> float:
        return temperature**2 if self.config.square_temperature else 1.0
