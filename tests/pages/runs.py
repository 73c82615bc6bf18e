"""Run folders for tests of pages, with a log that the test gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_schemas import Run
from cache_schemas.run import METRICS_FILE
from dimefm.training.run_folder import write_run

Line = dict[str, Any]


def train(step: int, **values: float | None) -> Line:
    """A line of a step."""
    return {"event": "train", "step": step, **values}


def validation(step: int, **scores: float) -> Line:
    """A line of a validation."""
    return {"event": "validation", "step": step, **scores}


def write(folder: Path, like: Run, lines: Sequence[Line], *, steps: int = 100, **config: Any) -> str:
    """A run of so many steps, with these fields in its config, that has logged these lines; its path."""
    folder.mkdir(parents=True)
    write_run(str(folder), replace(like, steps=steps, config={**like.config, **config}))
    if lines:
        append(folder, *lines)
    return str(folder)


def append(folder: Path | str, *lines: Line | str) -> None:
    """Log further lines; a string as it is, as if a kill had cut it short."""
    with Path(folder, METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines))


def finish(folder: Path | str, step: int) -> None:
    """Write the checkpoint of a step, as far as a page looks at it."""
    kept = Path(folder, "checkpoints")
    kept.mkdir(exist_ok=True)
    (kept / f"step-{step:08d}.pt").touch()
    (kept / "last.json").write_text(json.dumps({"step": step, "crc32c": {}}))
