"""The training loop where there is a GPU: what a CPU cannot show of it."""

from __future__ import annotations

import copy
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import StudentSpec
from dimefm.errors import TrainingError
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from dimefm.training import build_towers
from dimefm.training import train as train_module
from dimefm.training.batch_norm import SyncBatchNorm
from dimefm.training.checkpoint_writer import CheckpointWriter
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.distributed import ALONE, Place, Vote, _meet, add_up, from_first, wait_for_all
from dimefm.training.read_metrics import last_validation, read_metrics
from dimefm.training.text_bank import TextBank
from dimefm.training.train import train
from tests.processes import FORKING, result_of
from tests.tiny_training import tiny_config, weights
from tests.training.test_distributed import free_port
from tests.training.test_train import interrupted_at

DEVICE = "cuda"
LOSS = LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5)
ALL = replace(LOSS, contrastive=0.2, queue=24, logit_scale="learned", scale=30.0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def pairs(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("pairs") / "p.zarr")
    retrieve(image_store.path, text_store.path, index=None, top_k=4, out=out, device="cpu")
    return out


def losses(run: str) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["event"] == "train"]


def on_gpu(images: Store, texts: Store, out: Path, **changes: Any) -> TrainConfig:
    return tiny_config(images, texts, out, **{"device": DEVICE, "log_every": 1, "precision": "bf16", **changes})


def test_the_losses_are_those_of_a_cpu(image_store: Store, text_store: Store, pairs: str, tmp_path: Path) -> None:
    config = on_gpu(image_store, text_store, tmp_path / "gpu", precision="fp32", max_steps=3, loss=ALL, pairs=pairs)
    train(config)
    train(replace(config, out=str(tmp_path / "cpu"), device="cpu"))
    np.testing.assert_allclose(losses(config.out), losses(str(tmp_path / "cpu")), rtol=0.02)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_step_waits_for_the_gpu_and_batches_come_page_locked(
    image_store: Store, text_store: Store, pairs: str, tmp_path: Path, precision: str, workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With all that a step can have. The first two are left out: libraries begin in them."""
    step, locked = train_module._Trainer._step, []

    def strict(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drawn = [value for value in vars(batch.texts[0]).values() if value is not None]
        locked.append(all(tensor.is_pinned() for tensor in (batch.pixels_B3HW, batch.teacher_BD, *drawn)))
        torch.cuda.set_sync_debug_mode("error" if batch.step >= 2 else "default")
        try:
            return step(self, batch, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train_module._Trainer, "_step", strict)
    config = on_gpu(
        image_store, text_store, tmp_path / "run", precision=precision, workers=workers, accumulate=2, clip_grad=1.0,
        ema=0.9, loss=ALL, pairs=pairs, max_steps=6,
    )  # fmt: skip
    train(config)
    assert all(locked)
    assert len(losses(config.out)) == 6
    assert np.isfinite(losses(config.out)).all()


def test_a_run_goes_on_where_it_was(
    image_store: Store, text_store: Store, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what a GPU's sums differ by from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = on_gpu(
        image_store, text_store, tmp_path / "whole", precision="fp32", ema=0.9, loss=ALL, pairs=pairs, lr=1e-3,
        checkpoint_every=1, max_steps=6,
    )  # fmt: skip
    train(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    with monkeypatch.context() as within:
        within.setattr(Checkpoints, "save", interrupted_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    assert Checkpoints(parts.out).step() == 3
    train(parts)
    np.testing.assert_allclose(losses(parts.out), losses(config.out), rtol=1e-3)
    one, other = weights(config.out), weights(parts.out)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name].float(), value.float(), rtol=1e-2, atol=1e-3, msg=name)


def tower(spec: StudentSpec) -> torch.nn.Module:
    """Quickly compiled."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, spec.embed_dim), torch.nn.GELU())


@pytest.mark.usefixtures("new_compiler")
def test_a_compiled_run_keeps_the_weights_and_names_of_one_that_is_not(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_towers, "build_student", tower)
    config = on_gpu(
        image_store, text_store, tmp_path / "plain", precision="fp32", accumulate=2, ema=0.5, max_steps=3, loss=LOSS
    )  # fmt: skip
    train(config)
    compiled = replace(config, out=str(tmp_path / "compiled"), compile=True)
    train(compiled)
    np.testing.assert_allclose(losses(compiled.out), losses(config.out), rtol=1e-2)
    one, other = weights(config.out), weights(compiled.out)
    assert one.keys() == other.keys()
    assert "1.weight" in one


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_norm_over_processes_is_the_usual_one_and_waits_for_nothing(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    usual = torch.nn.BatchNorm2d(8, device=DEVICE)
    other = copy.deepcopy(usual)
    other.__class__, other.place = SyncBatchNorm, ALONE
    images = torch.randn(16, 8, 7, 5, device=DEVICE).mul(3).add(2).to(dtype, memory_format=layout)
    slope, found = torch.randn(16, 8, 7, 5, device=DEVICE), []
    for norm in (usual, other):
        x = images.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = norm(x)
            (y.float() * slope).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert y.dtype == x.grad.dtype == dtype
        found.append([y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)


def test_gradient_checkpointing_is_the_same_in_less_memory(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    peaks, config = [], on_gpu(
        image_store, text_store, tmp_path / "kept", student="test_vit", image_size=None, precision="fp32",
        patch_dropout=0.25, max_steps=2, loss=LOSS,
    )  # fmt: skip
    again = replace(config, out=str(tmp_path / "again"), gradient_checkpointing=True)
    for one in (config, again):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(one)
        peaks.append(torch.cuda.max_memory_allocated())
    np.testing.assert_allclose(losses(again.out), losses(config.out), rtol=1e-3)
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_texts_are_the_same_wherever_they_are_held(
    text_store: Store, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.training.text_bank._room_in_memory", lambda: 2**40 * (place == "memory"))
    if place != "device":
        monkeypatch.setattr("dimefm.training.text_bank._room_on", lambda device: 0)
    device = torch.device(DEVICE)
    bank = TextBank(text_store, TextMix(), None, seed=0, total=32, device=device)
    assert bank.kept_in == place
    bank.upload(device)
    drawn = bank.draw(1, np.arange(4))
    found = bank.embeddings(drawn, train_module.Transfer(device).send)
    assert found.device.type == DEVICE
    np.testing.assert_array_equal(found.cpu().numpy(), text_store.gather(drawn.rows_T.numpy()).astype(np.float32))


def test_validation_with_both_kinds_of_weights(
    cifar10: str, image_store: Store, text_store: Store, prompt_store: Store, tmp_path: Path
) -> None:
    config = on_gpu(
        image_store, text_store, tmp_path / "run", ema=0.5, val=(cifar10,), val_texts=prompt_store.path, max_steps=2
    )  # fmt: skip
    train(config)
    scores = last_validation(config.out)
    assert scores.keys() == {"cifar10", "cifar10_ema"}
    assert all(0.02 < score < 0.4 for score in scores.values())


def test_what_is_saved_is_the_state_when_it_was_asked_for(tmp_path: Path) -> None:
    weight = torch.ones(4, 2**20, device=DEVICE)
    with CheckpointWriter(Checkpoints(str(tmp_path))) as saving:
        saving.begin(1, {"weight": weight, "step": torch.tensor(3.0)})
        weight.zero_()
    found = Checkpoints(str(tmp_path)).load()
    assert found is not None
    assert bool((found["weight"] == 1).all())
    assert float(found["step"]) == 3


def test_too_little_memory_has_a_remedy(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, calls = train_module.TowerTrainer.learn, []

    def greedy(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.empty(2**46, device=DEVICE) if len(calls) == 3 else None)
        return learn(*args, **kwargs)

    monkeypatch.setattr(train_module.TowerTrainer, "learn", greedy)
    config = on_gpu(image_store, text_store, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"16 images of 32 px.*Tried to allocate(?s:.*)--accumulate 2"):
        train(config)
    assert Checkpoints(config.out).step() == 3


def contexts_at_forks(config: TrainConfig) -> list[bool]:
    """Whether a GPU was in use whenever a process was started."""
    start, found = multiprocessing.process.BaseProcess.start, list[bool]()

    def starting(self: Any) -> None:
        found.append(any(torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(torch.cuda.device_count())))
        start(self)

    multiprocessing.process.BaseProcess.start = starting  # type: ignore[method-assign]
    train(config)
    return found


def test_readers_are_forked_before_a_gpu_is_in_use(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    """In a process of its own: this one has a context already."""
    config = on_gpu(image_store, text_store, tmp_path / "run", workers=2, max_steps=2)
    assert result_of(contexts_at_forks, config) == [False, False]


def one_rank(port: int) -> list[object]:
    """What a group of one process on a GPU gives, by way of memory and by NCCL."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    _meet(device)
    place, vote = Place(0, 2, device), Vote(Place(0, 2, device))  # as if there were another
    summed = torch.full((3,), 2.0, device=device)
    torch.distributed.all_reduce(summed)
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1, device=device))
    module(summed[None]).sum().backward()
    gradient = module.module.weight.grad
    assert gradient is not None
    found = [summed.tolist(), gradient.tolist(), add_up([4], place), from_first("x", place)]
    found += [[vote.cast(number) for number in (0, 15, 0)]]
    wait_for_all(place)
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch was built without NCCL")
def test_nccl_with_one_rank() -> None:
    expected = [[2.0] * 3, [[2.0] * 3], [4], "x", [0, 0, 15]]
    assert result_of(one_rank, free_port()) == expected


def test_one_rank_under_torchrun_trains(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = on_gpu(image_store, text_store, tmp_path / "run", workers=1, max_steps=2)
    process = FORKING.Process(target=trained, args=(config, free_port()))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(losses(config.out)) == 2


def trained(config: TrainConfig, port: int) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(config)
