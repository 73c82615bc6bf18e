"""How the loop keeps a device at work: nothing within a step waits for it, and what follows from a step waits for it
alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache_schemas import StudentSpec
from dimefm.errors import TrainingError
from dimefm.store.embedding_store import Store
from dimefm.training import build_towers
from dimefm.training import train as train_module
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig
from dimefm.training.not_finite import explain_out_of_memory
from dimefm.training.read_metrics import read_metrics
from dimefm.training.train import train
from tests.e2e.test_kill import flat
from tests.tiny_training import STEPS, tiny_config

Trainer = train_module._Trainer
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Waits(TorchDispatchMode):
    """The operations that on a GPU wait until it has done all that it was given."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [name for name in WAITING if func.overloadpacket.__name__.startswith(name)]
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What waits for the device within the steps that are taken meanwhile."""
    found: list[str] = []
    step = Trainer._step

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as within, Waits(found):
            for name in ("tolist", "numpy", "cpu"):
                original = getattr(torch.Tensor, name)
                within.setattr(torch.Tensor, name, lambda *a, n=name, o=original, **k: (found.append(n), o(*a, **k))[1])
            return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_step", stepping)
    yield found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_waits_for_the_device_within_a_step(
    image_store: Store, text_store: Store, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that a step can have but pairs: passes, clipping, scaler, average, queue, learned scale."""
    config = tiny_config(
        image_store, text_store, tmp_path / "run", precision=precision, max_steps=3, accumulate=2, clip_grad=1.0,
        ema=0.9, loss=LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5, queue=24,
                                 logit_scale="learned", scale=30.0),
    )  # fmt: skip
    with watched(monkeypatch) as found:
        train(config)
    assert not found


def test_a_wait_within_a_step_would_be_seen(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Trainer._clip

    def waiting(self: Any) -> Any:
        found = clip(self)
        assert found[2].item() > 0
        assert len(found[1].tolist()) > 1
        return found

    monkeypatch.setattr(Trainer, "_clip", waiting)
    with watched(monkeypatch) as found:
        train(tiny_config(image_store, text_store, tmp_path / "run", max_steps=1))
    assert {"_local_scalar_dense", "tolist"} <= set(found)


def test_a_step_is_read_after_the_next_is_given_or_before_it_is_saved(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []

    def noted(name: str, step: Any) -> None:
        original = getattr(Trainer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            events.append((name, step(args)))
            return result

        monkeypatch.setattr(Trainer, name, call)

    noted("_step", lambda args: args[0].step + 1)
    noted("_finish", lambda args: args[0].step + 1)
    noted("_save", lambda args: args[0])
    train(tiny_config(image_store, text_store, tmp_path / "run", max_steps=6, checkpoint_every=4, log_every=1))
    assert events == [
        ("_step", 1), ("_step", 2), ("_finish", 1), ("_step", 3), ("_finish", 2), ("_step", 4), ("_finish", 3),
        ("_finish", 4), ("_save", 4), ("_step", 5), ("_step", 6), ("_finish", 5), ("_finish", 6), ("_save", 6),
    ]  # fmt: skip
    assert [line["step"] for line in read_metrics(str(tmp_path / "run"))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_what_is_told_of_a_broken_step_is_of_that_step_and_none_is_saved(
    image_store: Store, text_store: Store, tmp_path: Path, checkpoint_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth step has a gradient that is not finite in one parameter; the sixth, given by then, in none."""
    clip, rows, calls = Trainer._clip, [], []
    step = Trainer._step

    def breaking(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            next(self.image.module.parameters()).grad.fill_(float("nan"))
        return clip(self)

    def stepping(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(batch.all_rows_G.tolist())
        return step(self, batch, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_clip", breaking)
    monkeypatch.setattr(Trainer, "_step", stepping)
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=checkpoint_every, log_every=1)
    with pytest.raises(
        TrainingError, match=r"step 5: .*grad_norm nan.*gradients that are not finite: 1 of \d+ \(image"
    ):
        train(config)
    assert len(calls) == (5 if checkpoint_every == 1 else 6)
    facts = json.loads((tmp_path / "run" / "stopped-at.json").read_text())
    assert facts["step"] == 5
    assert facts["rows"] == rows[4]
    assert len(facts["parameters_with_a_gradient_that_is_not_finite"]) == 1
    assert [line["step"] for line in read_metrics(config.out)] == [1, 2, 3, 4]
    assert Checkpoints(config.out).step() == (4 if checkpoint_every == 1 else 3)


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, STEPS), (1e9, 1)], ids=["always due", "never due"])
def test_checkpoints_go_by_time_where_no_steps_are_given(
    image_store: Store, text_store: Store, tmp_path: Path, seconds: float, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "_SECONDS_BETWEEN_CHECKPOINTS", seconds)
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=None, keep=100)
    train(config)
    assert len(Checkpoints(config.out).steps()) == saved
    assert Checkpoints(config.out).step() == STEPS


def test_too_little_memory_on_a_gpu_has_a_remedy_and_costs_nothing(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, calls = train_module.TowerTrainer.learn, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
            )
        return learn(*args, **kwargs)

    monkeypatch.setattr(train_module.TowerTrainer, "learn", failing)
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(
        TrainingError, match=r"16 images of 32 px per process, in 1 pass, .*: CUDA out.*GPU 0 has"
    ) as caught:
        train(config)
    assert "give --accumulate 2 (" in str(caught.value)
    assert Checkpoints(config.out).step() == 3
    monkeypatch.undo()
    train(replace(config, accumulate=2), allow_changes=("accumulate",))


def test_more_passes_than_images_are_no_remedy() -> None:
    with (
        pytest.raises(TrainingError, match=r"in 4 passes(?s:.*): give a smaller --batch-size"),
        explain_out_of_memory(7, 4, 32),
    ):
        raise torch.OutOfMemoryError


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_keeps_the_weights_and_names_of_one_that_is_not(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes, whose first has no gradients, with a moving average; and goes on from there without compiling."""

    def tower(spec: StudentSpec) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, spec.embed_dim), torch.nn.GELU())

    monkeypatch.setattr(build_towers, "build_student", tower)
    config = tiny_config(image_store, text_store, tmp_path / "plain", accumulate=2, ema=0.5, max_steps=3)
    train(config)
    compiled = replace(config, out=str(tmp_path / "compiled"), compile=True)
    train(compiled)
    one, other = (flat(Checkpoints(run.out).load()) for run in (config, compiled))
    assert one.keys() == other.keys()
    assert "image.model.1.weight" in one
    assert "image.ema.weights.1.weight" in one
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)
    train(replace(compiled, compile=False, max_steps=4), allow_changes=("compile", "max_steps"))
