"""Checkpoints of a run: written whole or not at all, the last few and the best kept.

RUN/checkpoints/step-00001200.pt   tensors and plain values only (read with weights_only=True)
RUN/checkpoints/last.json          {"step": 1200}; best.json also has the score
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from cache_schemas.run import CHECKPOINTS
from dimefm import storage
from dimefm.errors import StoreError

_NAME = re.compile(r"step-(\d{8})\.pt")
_KEEP = 2


class Checkpoints:
    """The checkpoints of the run in folder `run`."""

    def __init__(self, run: str) -> None:
        self._folder = Path(run) / CHECKPOINTS

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Write the state after `step` steps; a `score` above all before makes it the best. Older ones go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._path(step)
        temporary = target.with_suffix(".unfinished")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        if score is not None and score > self._best_score():
            storage.write_json(str(self._folder / "best.json"), {"step": step, "score": score})
        storage.write_json(str(self._folder / "last.json"), {"step": step})  # last: from here on the step is done
        self._forget()

    def load(self, which: str = "last") -> dict[str, Any] | None:
        """The state of "last" or "best"; None where there is none yet. Raises StoreError for a damaged file."""
        step = self.step(which)
        if step is None:
            return None
        path = self._path(step)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            others = ", ".join(str(s) for s in self._steps() if s != step) or "none"
            reason = str(error).strip().split("\n")[0]
            remedy = f"delete it and set the step in {which}.json to another one (there: {others})"
            raise StoreError(f"{path} cannot be read: {reason}", remedy=remedy) from None

    def step(self, which: str = "last") -> int | None:
        """The step of "last" or "best", None where there is none."""
        path = self._folder / f"{which}.json"
        return int(storage.read_json(str(path))["step"]) if path.exists() else None

    def _best_score(self) -> float:
        path = self._folder / "best.json"
        return float(storage.read_json(str(path))["score"]) if path.exists() else float("-inf")

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"

    def _steps(self) -> list[int]:
        return sorted(int(m[1]) for p in self._folder.iterdir() if (m := _NAME.fullmatch(p.name)))

    def _forget(self) -> None:
        kept = {*self._steps()[-_KEEP:], self.step("last"), self.step("best")}
        for step in self._steps():
            if step not in kept:
                self._path(step).unlink()
        for leftover in self._folder.glob("*.unfinished"):
            leftover.unlink()
