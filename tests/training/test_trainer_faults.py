"""The trainer when things break: full disks, damaged stores, signals, numbers that are not finite."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas.run import TextSpec
from dimefm.cli import cli
from dimefm.errors import StoreError, TrainingError
from dimefm.store.embedding_store import Store
from dimefm.training import batch_loader
from dimefm.training.batch_loader import Request
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample
from dimefm.training.run_folder import read_run
from dimefm.training.run_log import RunLog
from dimefm.training.text_batches import TrainingTexts
from dimefm.training.train import train
from tests.e2e.test_faults import Disk
from tests.processes import Command
from tests.tiny_training import same, tiny_config, weights

SMALL = {"student": "test_resnet"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    yield found
    found.unmount()


@pytest.fixture(scope="module")
def undisturbed(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(tiny_config(image_store, text_store, out, **SMALL))
    return out


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    disk: Disk, image_store: Store, text_store: Store, undisturbed: Path
) -> None:
    size = next(undisturbed.glob("checkpoints/*.pt")).stat().st_size
    out = disk.path / "run"
    config = tiny_config(image_store, text_store, out, checkpoint_every=1, **SMALL)
    disk.options(f"size={int(2.5 * size) // 1024}k")  # room for two, and the third is written before one goes
    with pytest.raises(StoreError, match=r"step-00000003.pt cannot be written: No space left on device"):
        train(config)
    assert Checkpoints(str(out)).step() == 2
    assert not list(out.rglob("*.unfinished"))
    disk.options("size=64m")
    train(config)
    assert same(weights(undisturbed), weights(out))


def test_a_disk_too_full_for_metrics_says_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with RunLog(sample("i", "t", str(tmp_path)), first=0, steps=4, enabled=True) as log:
        log._file.close()
        log._file = Path("/dev/full").open("w")  # noqa: SIM115
        with pytest.raises(StoreError, match=r"metrics.jsonl cannot be written: No space left on device"):
            log.train(1, {"loss": 1.0})
        with suppress(OSError):
            log._file.close()
        log._file = Path("/dev/null").open("w")  # noqa: SIM115


def test_a_step_whose_values_are_read_late_counts_for_the_time_that_it_took(tmp_path: Path) -> None:
    with RunLog(sample("i", "t", str(tmp_path)), first=0, steps=3, enabled=True) as log:
        for step, took in ((1, 2.0), (2, 2.0), (3, 4.0)):  # read at the same moment, as the last two of a run are
            log.step(step, images=16, waited=1.0, at=log._now + took)
            log.train(step, {"loss": 1.0})
    lines = read_metrics(str(tmp_path))
    assert [line["images_per_second"] for line in lines] == [8.0, 8.0, 4.0]
    assert [line["data_wait"] for line in lines] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("damage", ["missing", "flipped"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_with_the_command_that_mends_it(
    image_store: Store, text_store: Store, tmp_path: Path, damage: str, workers: int
) -> None:
    copy = tmp_path / "images.zarr"
    shutil.copytree(image_store.path, copy)
    shard = copy / "embedding" / "c" / "1" / "0"
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[1000] ^= 1
        shard.write_bytes(data)
    config = tiny_config(Store(str(copy)), text_store, tmp_path / "run", workers=workers, **SMALL)
    with pytest.raises((StoreError, TrainingError), match=r"embedding/c/1/0.*(?s:.*)dimefm verify"):
        train(config)


def test_a_store_that_a_reader_cannot_read_is_one_message(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dimefm.training.text_batches.tokenizer_of", lambda spec: lambda texts: torch.zeros(len(texts), 8)
    )
    for name, store in (("images", image_store), ("texts", text_store)):
        shutil.copytree(store.path, tmp_path / name)
        shard = tmp_path / name / "embedding" / "c" / "1" / "0"
        shard.unlink()
        shard.symlink_to("0")
    rows = np.arange(32, 36)
    images = TrainingImages(str(tmp_path / "images"), Augmentation(size=32, crop_scale=(0.5, 1.0), flip=True, seed=0))
    spec = TextSpec(name="any", text_cfg={}, embed_dim=16, activation="gelu")
    texts = TrainingTexts(str(tmp_path / "texts"), spec)
    for dataset in (images, texts):
        found = dataset[Request(0, 0, rows, rows, window_N=rows)]
        assert isinstance(found, TrainingError)
        assert "embedding/c/1/0 cannot be read: Too many levels" in str(found)
        assert "remedy: " in str(found)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_step_it_is_at(
    tiny_run: list[str], tmp_path: Path, number: signal.Signals, code: int, workers: str
) -> None:
    out = tmp_path / "run"
    words = [*tiny_run, "--student", "test_resnet", "--workers", workers, "--checkpoint-every", "100000",
             "--max-steps", "2000", "--epochs", "2000", "--log-every", "1", "--out", str(out)]  # fmt: skip
    command = Command(words)
    command.wait_until(lambda: len(read_metrics(str(out))) > 3)
    command.send(number)
    printed = command.finish(code)
    step = Checkpoints(str(out)).step()
    assert step is not None
    assert f"was stopped by {number.name} after step {step:,} of 2,000" in printed
    assert "Traceback" not in printed
    assert read_metrics(str(out))[-1]["step"] == step


def test_a_run_that_was_stopped_goes_on_to_the_same_student(
    tiny_run: list[str], undisturbed: Path, image_store: Store, text_store: Store, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=100, **SMALL)
    before = signal.getsignal(signal.SIGTERM)
    learn, calls = train.__globals__["TowerTrainer"].learn, []

    def signalling(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return learn(*args, **kwargs)

    monkeypatch.setattr(train.__globals__["TowerTrainer"], "learn", signalling)
    with pytest.raises(Exception, match="stopped by SIGTERM after step 3 of 8"):
        train(config)
    assert signal.getsignal(signal.SIGTERM) == before, "the handler stays"
    train(config)
    assert same(weights(undisturbed), weights(config.out))


def test_not_a_number_names_what_led_to_it(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", lr=1e30, warmup_epochs=0, **SMALL)
    with pytest.raises(TrainingError, match=r"step \d+: loss nan(?s:.*)gradients that are not finite: \d+") as caught:
        train(config)
    assert "grad_norm" in str(caught.value)
    facts = json.loads((tmp_path / "run" / "stopped-at.json").read_text())
    assert len(facts["rows"]) == 16
    assert facts["cached_embeddings_that_are_not_finite_of"] == []
    assert facts["parameters_with_a_gradient_that_is_not_finite"]
    assert Checkpoints(config.out).step() is None


def test_an_embedding_that_is_not_a_number_is_blamed(text_store: Store, tmp_path: Path, image_store: Store) -> None:
    copy = tmp_path / "images.zarr"
    shutil.copytree(image_store.path, copy)
    store = Store(str(copy))
    arrays = store.shard_arrays(0)
    arrays["embedding"][:] = np.nan
    commit = store.commit(0)
    assert commit is not None
    store.write_shard(0, arrays, commit.failures, device="cpu", seconds=1)
    config = tiny_config(store, text_store, tmp_path / "run", loss=LossConfig(), **SMALL)
    with pytest.raises(TrainingError, match="cached embeddings of images are not finite"):
        train(config)


def test_changes_that_are_named_are_made_and_recorded(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=4, **SMALL)
    train(config)
    longer = replace(config, max_steps=6, lr=1e-3, weight_decay=0.2)
    with pytest.raises(Exception, match=r"(?s)lr: 0.004 != 0.001.*--allow-changes"):
        train(longer)
    with pytest.raises(Exception, match=r"lr: 0.004 != 0.001"):
        train(longer, allow_changes=("max_steps", "weight_decay"))
    train(longer, allow_changes=("max_steps", "weight_decay", "lr"))
    run = read_run(config.out)
    changed = {change.field: (change.step, change.values) for change in run.changes}
    assert changed == {
        "max_steps": (4, "4 != 6"), "lr": (4, "0.004 != 0.001"), "weight_decay": (4, "0.05 != 0.2"),
        "steps": (4, "4 != 6"),
    }  # fmt: skip
    state = Checkpoints(config.out).load()
    assert state is not None
    assert state["step"] == 6
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
    train(longer)  # the same command again is no change


def test_a_change_that_cannot_be_made_leaves_the_run_as_it_was(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=4, loss=LossConfig(), **SMALL)
    train(config)
    before = (tmp_path / "run" / "run.json").read_bytes()
    wrong = replace(config, max_steps=6, val=(str(tmp_path / "nowhere"),))
    with pytest.raises(Exception, match="nowhere"):
        train(wrong, allow_changes=("max_steps",))
    for part in ({"queue": 8}, {"logit_scale": "learned"}):
        other = replace(config, loss=replace(config.loss, **part))
        with pytest.raises(Exception, match=f"loss.{next(iter(part))}: "):
            train(other, allow_changes=("loss",))
    with pytest.raises(TrainingError, match="has done 4 steps already, more than 2"):
        train(replace(config, max_steps=2), allow_changes=("max_steps",))
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    train(config)


def test_another_precision_can_be_gone_on_with(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=2, **SMALL)
    train(config)
    other = replace(config, max_steps=4, precision="fp16")
    assert train(other, allow_changes=("max_steps", "precision")).steps == 4


def test_fp16_that_never_has_a_finite_gradient_ends_the_run(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler halves its scale in vain; one step of it is no reason to stop."""
    clip = train.__globals__["_Trainer"]._clip

    def broken(self: Any) -> torch.Tensor:
        for parameter in self.image.module.parameters():
            parameter.grad.fill_(float("inf"))
        self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"] = {
            torch.device("cpu"): torch.ones(())
        }
        return clip(self)  # type: ignore[no-any-return]

    monkeypatch.setattr(train.__globals__["_Trainer"], "_clip", broken)
    config = tiny_config(
        image_store, text_store, tmp_path / "run", precision="fp16", max_steps=40, epochs=10, log_every=1, **SMALL
    )  # fmt: skip
    with pytest.raises(TrainingError, match="step 17: "):
        train(config)
    lines = read_metrics(config.out)
    assert len(lines) == 16
    assert lines[0]["grad_norm"] is None, "not JSON"


def held_from_the_fifth() -> None:
    """In the process of the command: its readers do not come to the end of the fifth batch or later ones, and those
    that are left end at once."""
    batch_loader._GRACE = 0.1
    read = TrainingImages._batch

    def reading(self: TrainingImages, request: Request) -> Any:
        while request.step >= 4:
            time.sleep(0.1)
        return read(self, request)

    TrainingImages._batch = reading  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "to_all",
    [True, pytest.param(False, marks=pytest.mark.slow)],  # test_train.py has a quicker one of a reader that dies
    ids=["SIGTERM to all", "a reader killed"],
)
def test_what_happens_to_the_readers_while_a_step_is_taken(tiny_run: list[str], tmp_path: Path, to_all: bool) -> None:
    out = tmp_path / "run"
    words = [*tiny_run, "--student", "test_resnet", "--workers", "2", "--checkpoint-every", "100000",
             "--max-steps", "2000", "--epochs", "2000", "--log-every", "1", "--out", str(out)]  # fmt: skip
    command = Command(words, prepare=None if to_all else held_from_the_fifth)
    command.wait_until(lambda: len(read_metrics(str(out))) >= 3)
    readers = children(command.pid)
    assert len(readers) >= 2
    if to_all:
        for pid in (*readers, command.pid):
            os.kill(pid, signal.SIGTERM)
        assert "was stopped by SIGTERM after step" in command.finish(143)
        assert Checkpoints(str(out)).step()
    else:
        os.kill(readers[-1], signal.SIGKILL)
        printed = command.finish(1)
        assert "a process that decodes images died" in printed
        assert "Traceback" not in printed


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are at work."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("name", ["student", "batch_size", "init"])
def test_changes_that_cannot_be_are_refused(image_store: Store, text_store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name} cannot change within a run"):
        train(tiny_config(image_store, text_store, tmp_path / "run"), allow_changes=(name,))


def test_a_checkpoint_of_a_step_can_be_exported(undisturbed: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(cli, ["export", str(undisturbed), "--out", str(tmp_path / "s"), "--checkpoint", "6"])
    assert done.exit_code == 0, done.output
    none = CliRunner().invoke(cli, ["export", str(undisturbed), "--out", str(tmp_path / "t"), "--checkpoint", "5"])
    assert none.exit_code == 1
    assert "has no checkpoint 5" in none.output
    assert torch.load(undisturbed / "checkpoints" / "step-00000006.pt", weights_only=True)["step"] == 6


def test_one_image_at_a_time_is_refused_where_batch_norm_has_nothing_to_average(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    """It ended in a traceback of torch."""
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=1)
    for changes in ({"batch_size": 1}, {"accumulate": 16}):
        with pytest.raises(
            TrainingError, match=r"of one image of 32 px cannot be trained on.*\n.*a larger --batch-size"
        ):
            train(replace(config, **changes))
    train(replace(config, batch_size=1, image_size=64))  # of a last map of 2 x 2


def test_what_was_probably_not_meant_is_said_before_the_first_step(
    image_store: Store, text_store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = LossConfig(vl=0, pvl=1)
    train(tiny_config(image_store, text_store, tmp_path / "run", max_steps=1, warmup_epochs=1, loss=loss))
    shown = capfd.readouterr().err
    assert "0 of 1: the run ends within its warm-up, which takes 6 steps (warmup_epochs=1)" in shown
    assert f"0 of 1: not used: the sentences of {text_store.path}: the vl loss" in shown
