"""The part of torch.distributed that the trainer needs under torchrun. With one process nothing is set up.

Shapes: B images of this process, G images of all processes, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous

from dimefm.errors import TrainingError
from dimefm.system.machine import choose_device
from dimefm.training.meeting import own_store

_T = TypeVar("_T")
_MEMORY = torch.device("cpu")
_TO_MEET = timedelta(minutes=30)  # all open the stores first, and some machines are slower
_TO_ANSWER = timedelta(hours=1)  # others wait while the first writes, longer than torch's default of ten minutes


@dataclass(frozen=True)
class Place:
    """Which of all processes this one is. The first, rank 0, writes the run folder."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """The rows of a global batch that this process has: every world-th, from its rank on."""
        return slice(self.rank, None, self.world)


ALONE = Place(0, 1, torch.device("cpu"))
"""A single process, for code that asks a place for its rows and not for its device."""


def find_place(device: str | None) -> Place:
    """Where torchrun has put this process, by the environment. Each process has one device: cuda:LOCAL_RANK, or the
    CPU. The GPU is not used yet, since processes are still to be forked.

    Raises TrainingError if there is no such GPU.
    """
    kind = choose_device(device)
    if kind == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            what = f"process {number} of this machine (LOCAL_RANK, counted from 0) sees {gpus} GPU{'s' * (gpus != 1)}"
            what += f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
            remedy = "give --nproc-per-node as many processes as there are GPUs, and let each of them see all of those"
            raise TrainingError(what, remedy=remedy)
        kind = f"cuda:{number}"
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), torch.device(kind))


def join_group(device: str | None) -> Place:
    """Begin to use the device of `find_place`, and meet the other processes, if torchrun started several.

    Raises TrainingError if they do not meet.
    """
    place = find_place(device)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if place.world > 1 and not distributed.is_initialized():
        _meet(place.device)
    return place


def _meet(device: torch.device) -> None:
    """Form a process group: tensors in memory go through gloo, those on GPUs through NCCL."""
    gpu: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    place = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=_TO_MEET))
        store = own_store(store, rank, world, _TO_MEET)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TO_ANSWER, **gpu)
    except (distributed.DistError, ValueError, TimeoutError) as error:
        remedy = "start it with torchrun, which sets all of this, with --master-port for another port"
        used = "EADDRINUSE" in str(error) or "already in use" in str(error)
        reason = "the port is in use, perhaps by another run" if used else str(error).strip().splitlines()[0]
        raise TrainingError(f"the processes do not meet at {place}: {reason}", remedy=remedy) from error


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turn the error of a process group, which comes where another process has ended, into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistBackendError) or "gloo/" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).partition(". This is")[0]
        what = f"another process of this run is gone: {reason}"
        remedy = "see what it printed; the same command goes on from the last checkpoint, by itself with --max-restarts"
        raise TrainingError(what, remedy=f"{remedy} of torchrun") from error


def leave_group(place: Place) -> None:
    """End what `join_group` began. Do not call it after an error: with NCCL it would wait for the other processes,
    and they for this one."""
    if place.world > 1:
        distributed.destroy_process_group()


def gather_batch(rows_BD: torch.Tensor, place: Place) -> torch.Tensor:
    """The rows of all processes in the order of the global batch, (G, D). Gradients go back to where a row came from.

    The gradient of a row is the sum of what all processes hand back for it. If the loss is the mean of those of all
    processes, and parameter gradients are averaged over processes, the result is the gradient of one process with the
    whole batch; for batch norm see training.batch_norm.
    """
    if place.world == 1:
        return rows_BD
    gathered_GD: torch.Tensor = _Gathered.apply(rows_BD, place)
    return gathered_GD


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: torch.Tensor, place: Place) -> torch.Tensor:
        ctx.place = place
        parts = [torch.empty_like(rows_BD, memory_format=torch.contiguous_format) for _ in range(place.world)]
        distributed.all_gather(parts, rows_BD.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: torch.Tensor) -> tuple[torch.Tensor, None]:
        total_GD = grad_GD.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total_GD)  # gloo has no reduce-scatter in every torch
        return total_GD[ctx.place.rows], None


def logsumexp_over_all(value: torch.Tensor, place: Place) -> torch.Tensor:
    """log(sum(exp(value))) over processes, for each element by itself; without a gradient."""
    if place.world == 1:
        return value
    largest = value.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    total = (value - largest).exp()
    distributed.all_reduce(total)
    return largest + total.log()


def require_same_step(planned: int, loaded: int, place: Place) -> None:
    """Raises TrainingError unless all processes plan to go on from the same step, and have loaded its checkpoint. Else
    they see different folders, or one of them sees the folder as it was before."""
    seen: list[Any] = [(planned, loaded)] * place.world
    if place.world > 1:
        distributed.all_gather_object(seen, (planned, loaded))
    steps = [step for steps in seen for step in steps]
    if len(set(steps)) > 1:
        what = f"the processes would go on from different steps: {sorted(set(steps))}"
        raise TrainingError(what, remedy="put --out on a file system that all machines share, and run it again")


def from_first(value: _T, place: Place) -> _T:
    """The `value` of rank 0, in all processes."""
    values = [value]
    if place.world > 1:
        distributed.broadcast_object_list(values, src=0, device=_MEMORY)
    return values[0]


def add_up(counts: list[int], place: Place) -> list[int]:
    """The sum of each count over all processes."""
    found = torch.tensor(counts)
    if place.world > 1:
        distributed.all_reduce(found)
    return found.tolist()


class Vote:
    """Lets all processes learn of a number in the same step: of the signal by which one of them was asked to stop.

    It goes through memory, beside the GPU's work, and no process waits for the others within a step: the numbers of one
    step are known in the next.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._before: tuple[torch.Tensor, Any] | None = None

    def cast(self, number: int) -> int:
        """Give this step's number, and get the largest that any process gave in the step before. A single process gets
        its own number at once."""
        if self._place.world == 1:
            return number
        found, before = torch.tensor(number), self._before
        self._before = found, distributed.all_reduce(found, distributed.ReduceOp.MAX, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


def mean_over_processes_(value: torch.Tensor, place: Place) -> None:
    """Replace the values of a tensor, in place, by the mean of those that all processes have."""
    if place.world > 1:
        distributed.all_reduce(value)
        value /= place.world


def wait_for_all(place: Place) -> None:
    """Wait until all processes are here, so that rank 0 finishes writing before others read or end."""
    add_up([0], place)
