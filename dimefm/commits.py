"""The commit of a shard, made from what was written."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from cache_schemas import Commit, Failure, Status
from dimefm import __version__


def make_commit(
    shard: int,
    start: int,
    status_N: np.ndarray[Any, Any],
    failures: Sequence[Failure],
    *,
    digest: str,
    device: str,
    seconds: float,
    plan: str | None = None,
    pixels: str | None = None,
) -> Commit:
    """The commit of a shard whose rows, from `start` on, have these status codes."""
    codes, counts = np.unique(status_N, return_counts=True)
    return Commit(
        shard=shard,
        start=start,
        stop=start + len(status_N),
        counts={Status(code).name: int(n) for code, n in zip(codes, counts, strict=True)},
        failures=tuple(failures),
        digest=digest,
        device=device,
        seconds=round(seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        plan=plan,
        pixels=pixels,
    )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers that are written."""
    packages = ("torch", "open_clip_torch", "zarr", "numpy")
    # dimefm's own is asked of the package: it runs from a checkout too, without being installed.
    own = {"python": platform.python_version(), "dimefm": __version__}
    return {**own, **{name: version(name) for name in packages}}
