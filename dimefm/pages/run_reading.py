"""What a training run has logged until now, as the page of runs draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schemas import Run
from cache_schemas.run import METRICS_FILE, REPORT_FILE
from dimefm.inspection.describe_model import as_written
from dimefm.pages.short_words import short_names
from dimefm.system import storage
from dimefm.system.wording import counted
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.read_metrics import whole_lines
from dimefm.training.run_folder import read_run

Points = list[tuple[float, float]]
"""Steps, each with a value; NaN where it was not finite, which JSON and metrics.jsonl have no number for."""

_EVENTS = ("train", "validation")
_NO_VALUE = ("event", "step", "epoch")


@dataclass(frozen=True)
class LoggedRun:
    """A run and the lines of its metrics.jsonl that count, in the order of their steps. No two have the same `name`.

    `cut` lines cannot be read. `again` lines are of steps that were done again after a resume: their later lines count.
    """

    path: str
    name: str
    run: Run
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    checkpoint: int
    stopped_at: int | None
    cut: int = 0
    again: int = 0

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return _count(self.config["batch_size"])

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of its last step is there."""
        return self.checkpoint >= self.run.steps

    @property
    def done(self) -> int:
        """The last step that is known to be done."""
        return max([self.checkpoint, *(_count(line["step"]) for line in self.lines[-1:])])

    def names(self, event: str) -> list[str]:
        """The names of the values of an event, in the order in which they first appear."""
        found = dict.fromkeys(name for line in self.lines if line["event"] == event for name in line)
        return [name for name in found if name not in _NO_VALUE]

    def points(self, event: str, name: str) -> Points:
        """A value over the steps that have it."""
        return [(line["step"], _number(line[name])) for line in self.lines if line["event"] == event and name in line]


def read_logged(paths: Sequence[str]) -> list[LoggedRun]:
    """The runs at `paths`, finished or not. Raises StoreError for a path without a run, SchemaError for a run.json that
    is not valid."""
    return [_read(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def missing(logged: LoggedRun) -> list[str]:
    """What a run lacks, in sentences that can follow its name."""
    sentences = []
    if not logged.finished:
        kept = (
            f"its last checkpoint is of step {logged.checkpoint:,}" if logged.checkpoint else "it has no checkpoint yet"
        )
        sentences.append(
            f"is not finished: {logged.done:,} of {counted(logged.run.steps, 'step')} are done, and {kept}"
        )
    if not logged.names("train"):
        sentences.append("has logged no step yet")
    if not logged.names("validation"):
        sentences.append("has no validation yet" if logged.config["val"] else "is not validated: it has no val")
    if logged.again:
        what = counted(logged.again, "line")
        sentences.append(f"was resumed: {what} of steps that were done again are left out, and their later lines count")
    return sentences


def broken(logged: LoggedRun) -> list[str]:
    """What went wrong in a run, in sentences that can follow its name."""
    sentences = []
    if logged.stopped_at is not None and not logged.finished:
        what = f"stopped at step {logged.stopped_at:,}, whose loss or gradient was not finite"
        sentences.append(f"{what}: {REPORT_FILE} in its folder says more")
    for event in _EVENTS:
        for name in logged.names(event):
            points = logged.points(event, name)
            if steps := [f"{step:,.0f}" for step, value in points if not math.isfinite(value)]:
                where = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps):,} steps, first {steps[0]}"
                sentences.append(f"logged no finite {name} at {where}; it is not drawn there")
    if logged.cut:
        be = "is" if logged.cut == 1 else "are"
        sentences.append(f"has {counted(logged.cut, 'line')} in {METRICS_FILE} that {be} cut short and left out")
    return sentences


def _read(path: str, name: str) -> LoggedRun:
    run, checkpoints = read_run(path), Checkpoints(path)
    lines, cut = whole_lines(Path(path) / METRICS_FILE)
    known = [line for line in lines if _is_known(line)]
    kept = _that_count(known)
    return LoggedRun(
        path=path,
        name=name,
        run=run,
        config=as_written(run.config),
        lines=kept,
        checkpoint=checkpoints.step() or 0,
        stopped_at=_stopped_at(path, checkpoints.step() or 0),
        cut=cut + len(lines) - len(known),
        again=len(known) - len(kept),
    )


def _is_known(line: Any) -> bool:
    return isinstance(line, dict) and line.get("event") in _EVENTS and isinstance(line.get("step"), int)


def _that_count(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without those of steps that were done again: a line of an earlier step takes all later ones away."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return list({(line["step"], line["event"]): line for line in kept}.values())


def _stopped_at(path: str, checkpoint: int) -> int | None:
    """The step that a run could not do. Of a step before its last checkpoint the report is an old one."""
    report = storage.join(path, REPORT_FILE)
    step = int(storage.read_json(report)["step"]) if storage.exists(report) else 0
    return step if step > checkpoint else None


def _count(value: Any) -> int:
    return int(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
