"""What `dimefm latency` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from cache_schemas.identity import Precision
from dimefm.errors import DimefmError

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """The models to measure, and how."""

    models: tuple[str, ...]
    out: str = "latency.json"
    """File of measurements on this machine; these are added to it."""
    batch: tuple[int, ...] = (1, 8, 64)
    """Images, or sentences, of a call; several with commas."""
    threads: tuple[int, ...] = ()
    """CPU threads of a call; several with commas. Default: one per core."""
    device: str | None = None
    """Device of the PyTorch models. Default: cuda where torch sees a GPU. ONNX models run on the CPU."""
    precision: Precision = "fp32"
    """Number format of the PyTorch models."""
    compiled: bool = False
    """Measure the PyTorch models that are named compiled by torch.compile, too: a minute or more for each."""
    with_teacher: bool = False
    """Measure the teacher of each run, too."""
    seconds: float = 2.0
    """Seconds of measuring for each model, tower and batch, after warming up."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            values = getattr(self, name)
            if any(value < 1 for value in values):
                raise DimefmError(f"--{name} takes numbers from 1 on", remedy=f"give --{name} 1,8 or the like")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        if not self.seconds > 0:
            raise DimefmError("--seconds must be more than 0", remedy="give --seconds 2 or the like")
