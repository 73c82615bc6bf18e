"""Which device to compute on, and how many cores there are."""

from __future__ import annotations

import os

import torch

from dimefm.errors import DimefmError


def choose_device(asked: str | None) -> str:
    """`asked`, or cuda where there is one and cpu elsewhere. Raises DimefmError for a GPU that is not there."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        raise DimefmError("--device cuda: torch sees no GPU here", remedy="give --device cpu, or mend the CUDA set-up")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
