"""Seconds on a device, and the limits that it has by measurement: matrix products and copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from benchmarks.measure import rounds
from dimefm.system.matrix_products import DTYPES, tf32

if TYPE_CHECKING:
    from benchmarks.gpu.kit import Kit

_TF32 = "tf32"
_DTYPES = {**DTYPES, _TF32: torch.float32}


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a call, over rounds of all `calls` in turn, each with inputs of its own so that caches help
    none; after one round that is not counted."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return statistics.median(rounds({"": all_of_them}, repeats, device)[""]) / len(calls)


def peak(kit: Kit, precision: str) -> float:
    """FLOP/s of a large product of random square matrices in that precision, or "tf32"; measured once for all steps."""
    name = f"peak {precision}"
    if name not in kit.known:
        side, dtype = kit.sizes.product, _DTYPES[precision]
        sets = [torch.randn(2, side, side, device=kit.device, dtype=dtype) for _ in range(4)]
        with tf32(kit.device) if precision == _TF32 else nullcontext():
            spent = seconds([lambda a=a, b=b: a @ b for a, b in sets], kit.device)
        kit.remember(name, 2 * side**3 / spent)
    return kit.known[name]


def copy_speed(kit: Kit) -> float:
    """Bytes per second, read and written ones counted, of a copy within the device's memory; measured once."""
    if "copy" not in kit.known:
        source, target = (torch.empty(kit.sizes.copy, dtype=torch.uint8, device=kit.device) for _ in range(2))
        source.random_()
        spent = seconds([lambda: target.copy_(source), lambda: source.copy_(target)], kit.device)
        kit.remember("copy", 2 * kit.sizes.copy / spent)
    return kit.known["copy"]
