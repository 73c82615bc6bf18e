"""Several processes of one training run: two on one card by gloo, NCCL with one, and what NCCL says to two on a card.

This process computes nothing and never touches the device, so that the others can be forked from it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.inputs import TINY
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.repeats import logged, small_run
from dimefm.train import train

_FORK = multiprocessing.get_context("fork")
_SECONDS = 12.0  # that two processes may take to find that they cannot meet


def ranks(kit: Kit) -> None:
    """All three."""
    kit.each(two_by_gloo, one_by_nccl, two_by_nccl)


def two_by_gloo(kit: Kit) -> None:
    """The losses of a run by two processes against those of one."""
    _together(kit, 1, "gloo", partial(kit.inputs.stores, TINY))  # made there, if no step has yet
    one = small_run(kit, kit.inputs.scratch("by-one"))
    two = replace(one, out=str(kit.inputs.scratch("by-two")))
    _together(kit, 1, "gloo", partial(train, one))
    _together(kit, 2, "gloo", partial(train, two))
    losses = [logged(Path(config.out)) for config in (one, two)]
    error = float(np.abs(losses[1] / losses[0] - 1).max()) if len(losses[0]) == len(losses[1]) else float("nan")
    at = f"{one.student}, fp32, B = {one.batch_size}, {len(losses[0])} steps on one {kit.device.type} device"
    kit.check("two processes by gloo against one: relative difference of a loss", error, "", at, most=1e-3)


def one_by_nccl(kit: Kit) -> None:
    """Collectives and DistributedDataParallel in a group of one."""
    backend = "nccl" if kit.device.type == "cuda" else "gloo"
    _together(kit, 1, backend, partial(_collectives, kit.device.type))
    kit.require(f"{backend} with one process: collectives and gradients are right", True)


def two_by_nccl(kit: Kit) -> None:
    """NCCL is known to refuse two processes on one card; what it says is kept."""
    if kit.device.type != "cuda":
        return
    try:
        _together(kit, 2, "nccl", partial(_collectives, "cuda"), _SECONDS)
        said = "they meet"
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
    kit.line("NCCL with two processes on one card", said)


def _collectives(device: str) -> None:
    """Raises RuntimeError where a collective or a gradient is not what it should be."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    values = torch.full((4,), float(rank + 1), device=device)
    distributed.all_reduce(values)
    parts = [torch.empty(4, device=device) for _ in range(world)]
    distributed.all_gather(parts, values)
    expected = world * (world + 1) / 2
    if not all(bool((part == expected).all()) for part in parts):
        raise RuntimeError(f"all_reduce and all_gather give {parts}, not {expected}")
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4).to(device)
    inputs = torch.randn(16, 8, device=device)
    (alone,) = torch.autograd.grad(module(inputs).square().mean(), [module.weight])
    DistributedDataParallel(module)(inputs).square().mean().backward()
    torch.testing.assert_close(module.weight.grad, alone)


def _together(kit: Kit, world: int, backend: str, work: Callable[[], object], most: float = 600.0) -> None:
    """Run `work` in `world` processes of one group. Raises RuntimeError with the traceback of the first that failed, or
    where they took too long."""
    folder = kit.inputs.scratch(f"together-{backend}-{world}")
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world, port, backend, kit.device.type, work, folder)
    processes = [_FORK.Process(target=_rank, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    allowed = max(0.0, min(most, kit.left() - 3))
    until = time.monotonic() + allowed
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    told = [path.read_text() for path in sorted(folder.iterdir())]
    if told or late or any(process.exitcode for process in processes):
        raise RuntimeError(told[0] if told else f"{len(late)} of {world} processes did not end in {allowed:.0f} s")


def _rank(
    rank: int, world: int, port: int, backend: str, device: str, work: Callable[[], object], folder: Path
) -> None:
    # LOCAL_RANK is the card, which is the same for all.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        if device == "cuda":
            torch.cuda.set_device(0)
        distributed.init_process_group(backend, timeout=timedelta(seconds=60))
        work()
    except BaseException:
        traceback.print_exc()
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # with NCCL an orderly end would wait for the others
