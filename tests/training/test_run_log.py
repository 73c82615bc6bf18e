"""What a run tells: TensorBoard reads its events, and a disk that is full ends it with one message."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dimefm.errors import StoreError
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample
from dimefm.training.run_log import RunLog


def log(out: Path, first: int, stop: int, loss: float) -> None:
    with RunLog(sample("i", "t", str(out)), first=first, steps=6, enabled=True) as run:
        for step in range(first + 1, stop + 1):
            run.train(step, {"loss": loss + step})


def test_tensorboard_reads_a_run_that_went_on_from_an_earlier_step(tmp_path: Path) -> None:
    log(tmp_path, 0, 5, loss=0.0)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    file.rename(tmp_path / "events.out.tfevents.0000000001.earlier")  # the second start is a later second's
    log(tmp_path, 3, 6, loss=10.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 14.0, 5: 15.0, 6: 16.0}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == expected
    assert {line["step"]: line["loss"] for line in read_metrics(str(tmp_path))} == expected


def test_events_that_cannot_be_written_end_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunLog(sample("i", "t", str(tmp_path)), first=0, steps=6, enabled=True) as run:
        run.train(1, {"loss": 1.0})
        monkeypatch.setattr("dimefm.training.run_log.RecordWriter.write", full)
        with pytest.raises(StoreError, match=r"cannot be written: No space left on device"):
            run.train(2, {"loss": 1.0})
    assert "Traceback" not in capfd.readouterr().err
