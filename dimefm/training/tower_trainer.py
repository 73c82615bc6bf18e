"""One tower of the student in training: inputs go in, gradients come out.

Shapes: B inputs of this process, G of all processes, T embeddings of the other modality, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dimefm.models.towers import has_convolutions
from dimefm.system.matrix_products import DTYPES
from dimefm.training.distributed import Place, average, gather_batch
from dimefm.training.moving_average import Average
from dimefm.training.objective import Objective


class Learner:
    """A tower with its objective and, with `ema`, the moving average of its weights.

    `prepare` takes inputs to what the tower takes, on its device. With `accumulate` parts a step needs the memory of
    one: features of all are computed without a graph, the loss and its gradient by them over the whole batch, and then
    part by part they are computed again with a graph, to which that gradient is handed (Gao et al. 2021,
    arXiv:2101.06983). The result is that of the whole batch, at the price of one more forward pass; batch norm, whose
    statistics are those of a part, is the exception.
    """

    def __init__(
        self,
        module: Any,
        objective: Objective,
        place: Place,
        *,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        precision: str,
        accumulate: int = 1,
        ema: float | None = None,
        compile: bool = False,
    ) -> None:
        self.layout = torch.channels_last if has_convolutions(module) else torch.contiguous_format
        self.module = module.to(place.device, memory_format=self.layout)
        self.objective = objective.to(place.device)
        self.average = Average(self.module, ema) if ema else None
        self._parallel = DistributedDataParallel(self.module) if place.world > 1 else None
        called: Any = self.module if self._parallel is None else self._parallel
        # Around DDP, whose buckets then cut the graph: gradients travel while those of earlier layers are computed.
        self._tower: Any = torch.compile(called) if compile else called
        self._place, self._prepare, self.dtype, self._parts = place, prepare, DTYPES[precision], accumulate

    def learn(
        self,
        inputs_B: torch.Tensor,
        teacher_BD: torch.Tensor,
        other_TD: torch.Tensor | None,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        seed: tuple[int, ...],
        scaler: torch.amp.GradScaler,
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of one step to the parameters; the loss and its parts over all processes, detached.
        Whatever goes in is on the tower's device.

        Random numbers that the tower draws come from `seed`.
        """
        teacher_GD = gather_batch(teacher_BD, self._place).float()
        parts = inputs_B.tensor_split(self._parts)
        if len(parts) == 1:
            features_BD = self._features(inputs_B, seed, 0)
        else:
            buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
            with torch.no_grad():
                features_BD = torch.cat([self._features(part, seed, i) for i, part in enumerate(parts)])
            for buffer, before in buffers:  # or batch norm would count every part twice
                buffer.copy_(before)
            features_BD.requires_grad_()
        student_BD = F.normalize(features_BD, dim=-1)
        loss, shown = self.objective(teacher_GD, student_BD, other_TD, pair, self._place)
        scaler.scale(loss).backward()
        if len(parts) > 1:
            assert features_BD.grad is not None
            gradients = features_BD.grad.tensor_split(self._parts)
            for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
                with nullcontext() if i == len(parts) - 1 else self._no_sync():
                    self._features(part, seed, i).backward(gradient)
        scale = self.objective.log_scale
        if scale is not None and scale.grad is not None:  # which is no parameter of the tower's DistributedDataParallel
            average(scale.grad, self._place)
        self.teacher_GD, self._student_BD = teacher_GD, student_BD.detach()
        values = torch.stack([loss.detach(), *shown.values()])
        average(values, self._place)
        return dict(zip(("loss", *shown), values, strict=True))

    def after_step(self) -> None:
        """What follows the optimiser's step."""
        self.objective.after_step(self.teacher_GD, self._student_BD, self._place)
        if self.average:
            self.average.update(self.module)

    def _features(self, inputs_B: torch.Tensor, seed: tuple[int, ...], part: int) -> torch.Tensor:
        torch.manual_seed(int(np.random.SeedSequence((*seed, self._place.rank, part)).generate_state(1, np.uint64)[0]))
        inputs = self._prepare(inputs_B)
        if inputs.ndim == 4:
            inputs = inputs.to(memory_format=self.layout)
        with torch.autocast(self._place.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features_BD: torch.Tensor = self._tower(inputs)
        return features_BD.float()

    def _no_sync(self) -> AbstractContextManager[None]:
        return nullcontext() if self._parallel is None else self._parallel.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Weights, the objective's state and the moving average."""
        average = self.average.state_dict() if self.average else None
        return {"model": self.module.state_dict(), "objective": self.objective.state_dict(), "ema": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.module.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self.average and state["ema"]:
            self.average.load_state_dict(state["ema"])
        elif self.average:  # asked for since: it begins with the weights as they are
            self.average.module.load_state_dict(state["model"])
