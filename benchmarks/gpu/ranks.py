"""Several processes of one run: two on one card by gloo, NCCL with one, and what NCCL says to two on a card."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.forked import forked, together
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.repeats import logged, small_run
from dimefm.training.train import train

_SECONDS = 12.0  # that two processes may take to find that they cannot meet


def ranks(kit: Kit) -> None:
    """All three."""
    kit.each(two_by_gloo, one_by_nccl, two_by_nccl)


def two_by_gloo(kit: Kit) -> None:
    """The losses of a run by two processes against those of one."""
    one = forked(kit, partial(small_run, kit, kit.inputs.scratch("by-one")))
    two = replace(one, out=str(kit.inputs.scratch("by-two")))
    forked(kit, partial(train, one))
    together(kit, _group(kit, 2, "gloo", partial(train, two)))
    losses = [logged(Path(config.out)) for config in (one, two)]
    error = float(np.abs(losses[1] / losses[0] - 1).max()) if len(losses[0]) == len(losses[1]) else float("nan")
    at = f"{one.student}, fp32, B = {one.batch_size}, {len(losses[0])} steps on one {kit.device.type} device"
    kit.check("two processes by gloo against one: relative difference of a loss", error, "", at, most=1e-3)


def one_by_nccl(kit: Kit) -> None:
    """Collectives and DistributedDataParallel in a group of one."""
    backend = "nccl" if kit.device.type == "cuda" else "gloo"
    together(kit, _group(kit, 1, backend, partial(_collectives, kit.device.type)))
    kit.require(f"{backend} with one process: collectives and gradients are right", True)


def two_by_nccl(kit: Kit) -> None:
    """NCCL is known to refuse two processes on one card; what it says is kept."""
    if kit.device.type != "cuda":
        return
    try:
        together(kit, _group(kit, 2, "nccl", partial(_collectives, "cuda")), _SECONDS)
        said = "they meet"
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
    kit.line("NCCL with two processes on one card", said)


def _collectives(device: str) -> None:
    """Raises RuntimeError or AssertionError where a collective or a gradient is not what it should be."""
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


def _group(kit: Kit, world: int, backend: str, work: Callable[[], object]) -> list[Callable[[], None]]:
    """`work` for each of `world` processes, which meet first. They share one card."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_PORT": port}

    def member(rank: int) -> None:
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), **{k: str(v) for k, v in common.items()}})
        distributed.init_process_group(backend, timeout=timedelta(seconds=60))
        work()  # the trainer takes the group as it finds it

    return [partial(member, rank) for rank in range(world)]
