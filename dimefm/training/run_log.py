"""The log of a run: metrics.jsonl and TensorBoard events in its folder, progress on the terminal, and a tracker.

A training line has every value that the trainer names: the loss and each of its parts (training/objective.py), the
gradient's norm, the learning rate. A new loss appears here without a change.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from cache_schemas.run import METRICS_FILE
from dimefm.system import storage
from dimefm.system.progress import Progress
from dimefm.system.wording import rate
from dimefm.training.config import TrainConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.tracker import Tracker


class RunLog:
    """The log of one process. Only that of rank 0 is `enabled`: others write and show nothing.

    A resumed run goes on after `first` steps: lines of later steps, written before it was stopped, are dropped.
    """

    def __init__(self, config: TrainConfig, *, first: int, steps: int, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        out = config.out
        self._path = Path(out) / METRICS_FILE
        kept = [line for line in read_metrics(out) if line["step"] <= first]
        with storage.writing_to(str(self._path)):
            storage.write_atomic(str(self._path), "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")
            self._events = _Events(out, first)
        self._progress = Progress("training", steps, "step", first)
        self._tracker = None
        if config.log_to:
            self._tracker = Tracker(config, self._progress.note, resumed=first > 0, kept=kept)
        self._began, self._images, self._waited = time.monotonic(), 0, 0.0
        self._now = self._began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            if self._tracker:
                self._tracker.close(failed=kind is not None)
            for file in (self._file, self._events):
                with suppress(OSError) if kind else nullcontext():  # or it would hide the error that ended the run
                    file.close()
            self._progress.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        """Show a line on the terminal only."""
        if self._enabled:
            self._progress.note(text)

    def step(self, done: int, *, images: int, waited: float, at: float) -> None:
        """Count a step that is done: `images` of all processes, given to the device at the time `at` after `waited`
        seconds for data."""
        if self._enabled:
            self._now = at
            self._images += images
            self._waited += waited
            self._progress.at(done)
            if self._tracker:
                self._tracker.hand_over()  # the steps before have been validated by now

    def train(self, done: int, values: dict[str, float]) -> None:
        """Log the values of a step, and since the line before: images per second, the share of time spent on waiting
        for data."""
        if not self._enabled:
            return
        seconds = max(self._now - self._began, 1e-9)
        share, shown = self._waited / seconds, rate(self._images, seconds, "image")
        speed = {"images_per_second": round(self._images / seconds, 1), "data_wait": round(share, 4)}
        self._began, self._images, self._waited = self._now, 0, 0.0
        self._write("train", done, {**values, **speed})
        self._progress.note(f"loss {values['loss']:.4f}, {shown}, {share:.0%} of the time waiting for data")

    def validation(self, done: int, scores: dict[str, float], seconds: float) -> None:
        """Log the top-1 of every validation set. The time of the validation does not count as training."""
        if self._enabled:
            self._began += seconds
            self._write("validation", done, scores)
            self._progress.note(", ".join(f"{name} top-1 {score:.3f}" for name, score in scores.items()))

    def flush(self) -> None:
        """Wait until all lines are on the disk, before a checkpoint says that their steps are done."""
        if self._enabled:
            if self._tracker:
                self._tracker.hand_over()
            with storage.writing_to(str(self._path)):
                storage.flush(str(self._path))

    def _write(self, event: str, step: int, values: dict[str, float]) -> None:
        with storage.writing_to(str(self._path)):
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"event": event, "step": step, **known}) + "\n")
            self._file.flush()
            self._events.add(step, {f"{event}/{name}": value for name, value in values.items()})
            if self._tracker:
                self._tracker.add(event, step, known)


class _Events:
    """A file of TensorBoard events. TensorBoard's own writer has a thread, in which a full disk only shows a traceback:
    the run would not end."""

    def __init__(self, out: str, first: int) -> None:
        """Begin the file with a mark: events of an earlier start after the step `first` no longer count. Raises
        OSError."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (Path(out) / name).open("ab")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if first:
            self._write(step=first + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add numbers by name. Raises OSError."""
        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=numbers))

    def close(self) -> None:
        """Close the file. Raises OSError."""
        self._file.close()

    def _write(self, **facts: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **facts).SerializeToString())
        self._file.flush()
