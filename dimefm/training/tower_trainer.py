"""One tower of the student in training: inputs go in, gradients come out.

Shapes: B inputs of this process, G of all processes, T embeddings of the other modality, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from dimefm.models.towers import has_convolutions
from dimefm.system.matrix_products import DTYPES
from dimefm.training.batch_norm import Statistics, own_statistics, set_statistics, share_statistics_
from dimefm.training.distributed import Place, gather_batch, mean_over_processes_
from dimefm.training.moving_average import MovingAverage
from dimefm.training.objective import Objective, Pair
from dimefm.training.several_teachers import SeveralObjectives


@dataclass(frozen=True)
class Learned:
    """A step of one tower: the loss and its parts by name, over all processes, and the embeddings that they were
    computed from. All are detached."""

    values: dict[str, torch.Tensor]
    teacher_GD: torch.Tensor
    student_BD: torch.Tensor


class TowerTrainer:
    """A tower with its objective and, with `ema`, the moving average of its weights.

    `prepare` turns inputs into what the tower takes, on its device. With `accumulate` parts a step needs the memory of
    one part only: the features of all parts are computed without a graph, then the loss over the whole batch and its
    gradient by the features, and then each part again with a graph, to which its slice of that gradient is handed (Gao
    et al. 2021, arXiv:2101.06983). The result is that of the whole batch, at the price of one more forward pass. Batch
    norm is the exception: its statistics are those of one part, of all processes (training.batch_norm). `recomputes`
    says that the backward pass computes parts of the tower again (models.tower_training).
    """

    def __init__(
        self,
        module: Any,
        objective: Objective | SeveralObjectives,
        place: Place,
        *,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        precision: str,
        accumulate: int = 1,
        ema: float | None = None,
        compile: bool = False,
        batch_norm: Statistics = "sync",
        recomputes: bool = False,
    ) -> None:
        set_statistics(module, batch_norm, place)
        self.layout = torch.channels_last if has_convolutions(module) else torch.contiguous_format
        self.module = module.to(place.device, memory_format=self.layout)
        self.objective = objective.to(place.device)
        self.moving_average = MovingAverage(self.module, ema) if ema else None
        self._parallel = _parallel(self.module) if place.world > 1 else None
        self._statistics = own_statistics(self.module)
        self._counted_again = list(self.module.buffers()) if recomputes else []
        called: Any = self.module if self._parallel is None else self._parallel
        # Compiled around DDP, whose buckets cut the graph: gradients travel while those of earlier layers are computed
        self._tower: Any = torch.compile(called) if compile else called
        self._place, self._prepare, self.dtype, self._parts = place, prepare, DTYPES[precision], accumulate

    def learn(
        self,
        inputs_B: torch.Tensor,
        teacher_BD: torch.Tensor,
        other: torch.Tensor | Sequence[torch.Tensor | None] | None,
        pair: Pair | Sequence[Pair | None] | None,
        *,
        seed: tuple[int, ...],
        scaler: torch.amp.GradScaler,
    ) -> Learned:
        """Add the gradients of one step to the parameters. All arguments are on the tower's device. `other` are
        embeddings (T, D) of the other modality; of several teachers, `other` and `pair` are one of each.

        Random numbers that the tower draws come from `seed`.
        """
        teacher_GD = gather_batch(teacher_BD, self._place).float()
        parts = inputs_B.tensor_split(self._parts)
        features_BD = self._features(inputs_B, seed, 0) if len(parts) == 1 else self._without_graph(parts, seed)
        student_BD = self.objective.unit(features_BD)
        loss, shown = self.objective(teacher_GD, student_BD, other, pair, self._place)
        with _unchanged(self._counted_again):
            scaler.scale(loss).backward()
        if len(parts) > 1:
            assert features_BD.grad is not None
            self._backward(parts, features_BD.grad, seed)
        for scale in self.objective.parameters():  # DistributedDataParallel has only the tower's parameters
            if scale.grad is not None:
                mean_over_processes_(scale.grad, self._place)
        values = torch.stack([loss.detach(), *shown.values()])
        mean_over_processes_(values, self._place)
        return Learned(dict(zip(("loss", *shown), values, strict=True)), teacher_GD, student_BD.detach())

    def after_step(self, learned: Learned) -> None:
        """Bring the objective, the statistics of batch norm and the moving average up to date, once the optimiser has
        taken its step."""
        share_statistics_(self._statistics, self._place)
        self.objective.after_step(learned.teacher_GD, learned.student_BD, self._place)
        if self.moving_average:
            self.moving_average.update(self.module)

    def _without_graph(self, parts: Sequence[torch.Tensor], seed: tuple[int, ...]) -> torch.Tensor:
        """The features of all parts, as a leaf that gets a gradient."""
        with torch.no_grad(), _unchanged(self.module.buffers()):
            features_BD = torch.cat([self._features(part, seed, i) for i, part in enumerate(parts)])
        return features_BD.requires_grad_()

    def _backward(self, parts: Sequence[torch.Tensor], grad_BD: torch.Tensor, seed: tuple[int, ...]) -> None:
        """Compute each part again, with a graph, and hand it its slice of the gradient."""
        for i, (part, gradient) in enumerate(zip(parts, grad_BD.tensor_split(self._parts), strict=True)):
            with nullcontext() if i == len(parts) - 1 else self._no_sync():
                part_BD = self._features(part, seed, i)
                with _unchanged(self._counted_again):
                    part_BD.backward(gradient)

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
        """Weights, the objective's state and the moving average, as a checkpoint keeps them."""
        ema = self.moving_average.state_dict() if self.moving_average else None
        return {"model": self.module.state_dict(), "objective": self.objective.state_dict(), "ema": ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.module.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self.moving_average and state["ema"]:
            self.moving_average.load_state_dict(state["ema"])
        elif self.moving_average:  # --ema was added since: the average begins with the weights as they are
            self.moving_average.module.load_state_dict(state["model"])


@contextmanager
def _unchanged(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within the block parts of a tower are computed a second time: batch norm does not count them twice."""
    saved = [(buffer, buffer.clone()) for buffer in buffers]
    yield
    for buffer, before in saved:
        buffer.copy_(before)


def _parallel(module: torch.nn.Module) -> DistributedDataParallel:
    """A tower whose gradients are means over all processes. Buffers are left to `after_step`: by default all processes
    would get those of rank 0. What says so has another name in newer releases of torch, which warn of the old one."""
    names = signature(DistributedDataParallel).parameters
    own_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    return DistributedDataParallel(module, **own_buffers)
