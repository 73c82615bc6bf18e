"""The moving average of a student's weights, which often scores above the weights themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch


class MovingAverage:
    """A copy of a module. After each step every weight w of the copy becomes d w + (1 - d) x, where x is the module's.

    d is min(decay, (1 + n) / (10 + n)) in step n, as in TensorFlow's ExponentialMovingAverage: the random weights of
    the start are soon forgotten. Buffers, such as those of batch norm, are averaged too; counters are copied.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Add the weights after one more step to the average."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        mine, theirs = self.module.state_dict(), module.state_dict()
        real = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[n] for n in real], [theirs[n] for n in real], 1 - decay)
        if counters := [name for name, value in mine.items() if not value.is_floating_point()]:
            torch._foreach_copy_([mine[n] for n in counters], [theirs[n] for n in counters])

    def state_dict(self) -> dict[str, Any]:
        """The weights and how many steps are in them."""
        return {"weights": self.module.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.module.load_state_dict(state["weights"])
        self._steps = state["steps"]
