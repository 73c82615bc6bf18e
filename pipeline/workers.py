"""How many workers a job has: as many as were asked for, or as are worth their start."""

from __future__ import annotations

from collections.abc import Callable

from dimefm.errors import DimefmError
from dimefm.system.machine import available_memory, cpus
from dimefm.system.wording import counted

START_SECONDS = 15.0
"""About what Ray takes to start, and workers to import their libraries, on two cores that have other work too. One
worker has more than that to do for every worker that is started."""
_WORKER_BYTES = 1_000_000_000  # memory of a worker beside the teacher's weights
_MEMORY_SHARE = 0.9  # part of the memory that all workers together may use


def require_cores(workers: int | None) -> None:
    """Raises DimefmError for more workers than this machine has cores: each computes on one, and needs memory of its
    own."""
    if workers and workers > cpus():
        what = f"--workers {workers:,}: this machine has {counted(cpus(), 'core')}, and each worker takes one"
        raise DimefmError(what, remedy=f"give --workers {cpus()}, or leave it out")


def choose_workers(device: str, *, shards: int, weight_bytes: int, seconds: Callable[[], float]) -> int:
    """The number of workers where none is asked for. On GPUs: one per GPU. On a CPU: at most one per core and per
    shard, as far as there is memory for a teacher in each, and as their work is worth their start. `seconds` says how
    long one worker alone would take; it is asked only where there may be several."""
    if device != "cpu":
        import torch  # not before what is asked for has been checked

        return torch.cuda.device_count()
    fit = int(_MEMORY_SHARE * available_memory()) // (_WORKER_BYTES + weight_bytes)
    most = min(cpus(), fit, shards)
    return max(1, min(most, int(seconds() / START_SECONDS))) if most > 1 else 1
