"""Checkpoints that a thread writes: what they hold, when they are there, and what comes of their errors."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch

from dimefm.errors import StoreError, TrainingError
from dimefm.system import storage
from dimefm.training.checkpoint_writer import CheckpointWriter
from dimefm.training.checkpoints import Checkpoints


def state(value: float = 1.0) -> dict[str, Any]:
    """Nested as a trainer's, with a tensor that is a part of another, and one that is not stored in its usual order."""
    whole = torch.full((4, 4), value)
    images = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    model = OrderedDict(weight=whole[:2], conv=images)
    return {"step": 3, "image": {"model": model, "ema": None}, "groups": [{"lr": 0.5, "params": [0, 1], "t": whole}]}


class Held:
    """Checkpoints whose saving waits until it is let go."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpoints, self.go, self.threads = Checkpoints(str(folder), keep=5), threading.Event(), set[int]()
        save = Checkpoints.save

        def holding(checkpoints: Checkpoints, *args: Any) -> None:
            self.threads.add(threading.get_ident())
            assert self.go.wait(60)
            save(checkpoints, *args)

        monkeypatch.setattr(Checkpoints, "save", holding)


def test_what_is_saved_is_the_state_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kept = Held(tmp_path, monkeypatch), state()
    with CheckpointWriter(held.checkpoints) as saving:
        saving.begin(3, kept)
        for tensor in (*kept["image"]["model"].values(), kept["groups"][0]["t"]):
            tensor.zero_()  # as the next steps do
        kept["groups"][0]["lr"] = 9.0
        saving.check()
        assert held.checkpoints.step() is None
        held.go.set()
        saving.wait()
        assert held.checkpoints.step() == 3
    found = held.checkpoints.load()
    assert found is not None
    assert found["step"] == 3
    assert found["image"]["ema"] is None
    model = found["image"]["model"]
    assert model["weight"].shape == (2, 4)
    assert model["conv"].is_contiguous(memory_format=torch.channels_last)
    assert found["groups"][0]["lr"] == 0.5
    assert all(bool((tensor == 1).all()) for tensor in (*model.values(), found["groups"][0]["t"]))
    assert held.threads
    assert threading.get_ident() not in held.threads


def test_a_state_is_copied_to_where_the_one_before_was(tmp_path: Path) -> None:
    """Memory that is new costs several times the copy, and the loop waits for it."""
    checkpoints = Checkpoints(str(tmp_path))
    with CheckpointWriter(checkpoints) as saving:
        saving.begin(1, state())
        first = [copy.data_ptr() for copy in saving._copies]
        saving.begin(2, state(2.0))
        assert [copy.data_ptr() for copy in saving._copies] == first
        changed = state(3.0)
        changed["image"]["model"]["weight"] = torch.full((3, 4), 3.0, dtype=torch.float64)
        saving.begin(3, changed)
        assert len(saving._copies) == len(first)
    found = checkpoints.load()
    assert found is not None
    weight, conv = found["image"]["model"].values()
    assert weight.dtype == torch.float64
    assert weight.tolist() == [[3.0] * 4] * 3
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert bool((conv == 3).all())
    before = checkpoints.load("2")
    assert before is not None
    assert bool((before["groups"][0]["t"] == 2).all())


def test_one_is_written_at_a_time_and_the_end_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, events = Checkpoints.save, []

    def slow(checkpoints: Checkpoints, step: int, *args: Any) -> None:
        events.append(("begun", step))
        time.sleep(0.05)
        save(checkpoints, step, *args)
        events.append(("done", step))

    monkeypatch.setattr(Checkpoints, "save", slow)
    with CheckpointWriter(Checkpoints(str(tmp_path))) as saving:
        saving.begin(1, state())
        saving.begin(2, state())
    assert events == [("begun", 1), ("done", 1), ("begun", 2), ("done", 2)]
    assert Checkpoints(str(tmp_path)).steps() == [1, 2]


@pytest.mark.parametrize("met", ["check", "begin", "wait", "the end"])
def test_what_fails_in_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, met: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def run() -> None:
        with CheckpointWriter(Checkpoints(str(tmp_path))) as saving:
            with monkeypatch.context() as within:
                within.setattr(os, "fsync", full)
                saving.begin(1, state())
                assert saving._writing
                saving._writing.exception()
            if met == "begin":
                saving.begin(2, state())
            elif met != "the end":
                getattr(saving, met)()

    with pytest.raises(StoreError, match=r"step-00000001.pt cannot be written: No space left on device"):
        run()
    assert Checkpoints(str(tmp_path)).step() is None
    assert not list(tmp_path.rglob("*.unfinished"))


def test_an_error_that_ends_a_run_is_not_hidden_by_one_of_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "remove_leftovers", lambda folder: (_ for _ in ()).throw(OSError(28, "full")))

    def run() -> None:
        with CheckpointWriter(Checkpoints(str(tmp_path))) as saving:
            saving.begin(1, state())
            raise TrainingError("the loss is not finite")

    with pytest.raises(TrainingError, match="the loss"):
        run()


def test_the_checksum_is_that_of_the_file_without_reading_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.training.checkpoints._BLOCK", 7)
    checkpoints = Checkpoints(str(tmp_path))
    with monkeypatch.context() as within:
        within.setattr("dimefm.training.checkpoints._checksum", lambda path: pytest.fail("the file is read"))
        checkpoints.save(3, state())
    path = tmp_path / "checkpoints" / "step-00000003.pt"
    written = storage.read_json(str(tmp_path / "checkpoints" / "last.json"))["crc32c"]
    assert written == {"3": google_crc32c.value(path.read_bytes())}
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="its checksum does not fit"):
        checkpoints.load()
