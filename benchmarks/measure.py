"""Timing in rounds: every candidate once a round, in turn, so that a machine that drifts drifts for all."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from dimefm.system.markdown_table import markdown_table


def rounds(candidates: dict[str, Callable[[], object]], count: int, device: Any = None) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, `count` of each after one that is not counted. Where `device`, a
    torch.device, is a GPU, what it was given to do is waited for before the clock is read."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(count + 1):
        for name, call in candidates.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def wait(device: Any) -> None:
    """Until a torch.device has done all that it was given; at once for a CPU, or none."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of `one` / `other`: robust against drift."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def excess(more: list[float], less: list[float]) -> float | None:
    """The median over rounds of `more` - `less`, or None where it cannot be told from zero: where the differences are
    spread by as much as that, it is the machine's other work that was measured."""
    differences = [a - b for a, b in zip(more, less, strict=True)]
    found = statistics.median(differences)
    return found if found > max(differences) - min(differences) else None


def machine() -> str:
    """The machine in a line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(markdown_table([head, *rows], padded=True))
