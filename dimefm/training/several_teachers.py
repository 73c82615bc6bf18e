"""What a student of several teachers minimises: each teacher's losses, on the columns of its own projection.

Shapes: B images of this process, G of all processes, D the sum of all teachers' widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dimefm.training.distributed import ALONE, Place
from dimefm.training.objective import Objective, Pair


class SeveralObjectives(torch.nn.Module):
    """The sum of the objectives of several teachers, each with a weight. It takes the place of an Objective.

    Embeddings of all teachers stand side by side, each of unit norm. Its state is that of the objectives, by number.
    """

    def __init__(self, objectives: Sequence[Objective], widths: Sequence[int], weights: Sequence[float]) -> None:
        """`widths` are those of the teachers' embeddings."""
        super().__init__()
        self.objectives = torch.nn.ModuleList(objectives)
        self._each = list(objectives)  # with their type
        self._widths, self._weights = list(widths), list(weights)

    def unit(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Features (B, D) with those of each teacher set to unit norm."""
        parts = [
            objective.unit(part_BD) for objective, part_BD in zip(self._each, self._parts(features_BD), strict=True)
        ]
        return torch.cat(parts, dim=1)

    def forward(
        self,
        teacher_GD: torch.Tensor,
        student_BD: torch.Tensor,
        texts: Sequence[torch.Tensor | None],
        pairs: Sequence[Pair | None],
        place: Place = ALONE,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As Objective's, with the texts and pairs of each teacher. The parts are called after the teacher's number, as
        teacher2_cosine is; teacher2_loss is all that it adds to the loss, before its weight."""
        losses, shown = [], dict[str, torch.Tensor]()
        of_each = zip(self._parts(teacher_GD), self._parts(student_BD), texts, pairs, strict=True)
        for number, (objective, of_one) in enumerate(zip(self._each, of_each, strict=True), 1):
            loss, parts = objective(*of_one, place)
            losses.append(self._weights[number - 1] * loss)
            values = {"loss": loss.detach(), **parts}
            shown |= {f"teacher{number}_{name}": value for name, value in values.items()}
        return torch.stack(losses).sum(), shown

    def after_step(self, teacher_GD: torch.Tensor, student_BD: torch.Tensor, place: Place = ALONE) -> None:
        """As Objective's."""
        parts = zip(self._parts(teacher_GD), self._parts(student_BD), strict=True)
        for objective, of_one in zip(self._each, parts, strict=True):
            objective.after_step(*of_one, place)

    def _parts(self, embedding_ND: torch.Tensor) -> list[torch.Tensor]:
        """The columns of each teacher."""
        return [part.contiguous() for part in embedding_ND.split(self._widths, dim=1)]
