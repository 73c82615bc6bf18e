"""Timing in rounds: every candidate once a round, in turn, so that a machine that drifts drifts for all."""

import os
import platform
import statistics
import time
from collections.abc import Callable


def rounds(candidates: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, `count` of each after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(count + 1):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of `one` / `other`: robust against drift."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def machine() -> str:
    """The machine in a line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, tuple("-" * w for w in widths), *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
