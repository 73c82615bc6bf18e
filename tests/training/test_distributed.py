"""Several processes train as one would with the whole batch: real gloo process groups on this machine."""

import json
import os
import signal
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dimefm.errors import StoppedError, TrainingError
from dimefm.models.towers import build_student, student_spec
from dimefm.store.embedding_store import Store
from dimefm.training import losses
from dimefm.training.batch_norm import own_statistics, share_statistics_
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.distributed import (
    ALONE,
    Place,
    Vote,
    add_up,
    explain_lost_process,
    find_place,
    from_first,
    gather_batch,
    join_group,
    leave_group,
    mean_over_processes_,
    require_same_step,
    wait_for_all,
)
from dimefm.training.objective import Objective
from dimefm.training.read_metrics import read_metrics
from dimefm.training.several_teachers import SeveralObjectives
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.train import train
from dimefm.training.validation import Validation
from tests.processes import FORKING, result_of
from tests.tiny_training import STUDENT, tiny_config

IMAGES, TEXTS, WIDTH, FIRST = 8, 12, 6, 4  # FIRST: the width of the first of two teachers
NO_LOSS = dict.fromkeys(LossConfig.WEIGHTS, 0.0)
OBJECTIVES: dict[str, LossConfig | tuple[LossConfig, LossConfig]] = {
    **{name: LossConfig(**{**NO_LOSS, name: 1.0}) for name in LossConfig.WEIGHTS},
    "pvl, udist without the diagonal": LossConfig(vl=0, pvl=0.5, udist=0.5, mask_diagonal=True),
    "scores with a queue": LossConfig(vl=0.7, pvl=0.3, udist=0.1, mask_diagonal=True, queue=11),
    "all with a queue and a learned scale": LossConfig(
        vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5, contrastive=0.2, queue=5, logit_scale="learned", scale=20.0
    ),
    "two teachers": (
        LossConfig(vl=0.7, pvl=0.3, queue=5, logit_scale="learned", scale=20.0),
        LossConfig(vl=0.2, pvl=0, udist=0.5, centred=0.5, contrastive=0.2, logit_scale="learned", scale=30.0),
    ),
}


def units(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator), dim=-1)


def objective_of(config: LossConfig | tuple[LossConfig, LossConfig]) -> Objective | SeveralObjectives:
    mean_D = units(1, 5)[0] / 2
    if isinstance(config, LossConfig):
        return Objective(config, teacher_scale=100.0, dim=WIDTH, mean_D=mean_D)
    means = mean_D.split([FIRST, WIDTH - FIRST])
    each = [
        Objective(one, teacher_scale=100.0, dim=len(mean), mean_D=mean) for one, mean in zip(config, means, strict=True)
    ]
    return SeveralObjectives(each, [FIRST, WIDTH - FIRST], [1.0, 0.5])


def two_steps(
    config: LossConfig | tuple[LossConfig, LossConfig], place: Place, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """What the second step finds, for which the queue has rows of the first: the loss and its parts, the gradients of
    the tower and of the scale."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, WIDTH).to(place.device, dtype)
    tower = DistributedDataParallel(model) if place.world > 1 else model
    objective = objective_of(config).to(place.device, dtype)
    text_TD, pair_GD = (units(rows, 3).half().to(place.device, dtype) for rows in (TEXTS, IMAGES))
    row_G, widths = torch.tensor([4, 1, -1, 4, 0, 7, -1, 2], device=place.device), [FIRST, WIDTH - FIRST]
    texts: Any = text_TD if isinstance(config, LossConfig) else text_TD.split(widths, dim=1)
    pairs: Any = (pair_GD, row_G)
    if not isinstance(config, LossConfig):
        pairs = [(part_GD, row_G) for part_GD in pair_GD.split(widths, dim=1)]
    inputs = torch.randn(2, IMAGES, 10, generator=torch.Generator().manual_seed(1)).to(place.device, dtype)
    for step in range(2):
        tower.zero_grad()
        objective.zero_grad()
        half_GD = units(IMAGES, 10 + step).half().to(place.device)
        teacher_GD = gather_batch(half_GD[place.rows], place).to(dtype)
        assert torch.equal(teacher_GD, half_GD.to(dtype)), "not in the order of the global batch"
        student_BD = objective.unit(tower(inputs[step][place.rows]))
        loss, parts = objective(teacher_GD, student_BD, texts, pairs, place)
        loss.backward()
        objective.after_step(teacher_GD, student_BD.detach(), place)
    values = [loss.detach(), *parts.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    values += [scale.grad for scale in objective.parameters() if scale.grad is not None]
    for value in values:
        mean_over_processes_(value, place)
    return [*values, *gradients]


def one_of_many(rank: int, world: int, port: int, out: str, chunk: int) -> None:
    """Any warning ends it, as that of a collective that is on its way out."""
    warnings.simplefilter("error")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    losses.CHUNK_LOGITS = losses.KEPT_LOGITS = chunk
    place = join_group("cpu")
    torch.save({name: two_steps(config, place) for name, config in OBJECTIVES.items()}, f"{out}/{rank}.pt")
    leave_group(place)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize(("world", "chunk"), [(2, 2**24), (4, 10)])
def test_every_loss_and_its_gradient_are_those_of_one_process_with_the_whole_batch(
    world: int, chunk: int, tmp_path: Path
) -> None:
    arguments = (world, free_port(), str(tmp_path), chunk)
    multiprocessing.start_processes(one_of_many, arguments, nprocs=world, start_method=FORKING.get_start_method())
    expected = {name: two_steps(config, ALONE) for name, config in OBJECTIVES.items()}
    for name, config in OBJECTIVES.items():  # the loss and its parts, two gradients; a learned scale and its gradient
        each = (config,) if isinstance(config, LossConfig) else config
        parts = sum(getattr(one, loss) > 0 for one in each for loss in LossConfig.WEIGHTS)
        learned = sum(one.logit_scale == "learned" for one in each)
        of_teachers = len(each) if len(each) > 1 else 0
        assert len(expected[name]) == 1 + of_teachers + parts + 2 + 2 * learned
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, values in expected.items():
            for mine, whole in zip(found[name], values, strict=True):
                torch.testing.assert_close(mine, whole, rtol=0, atol=1e-10, msg=f"{name} on {rank}: {mine}, {whole}")


def meet(port: str) -> str:
    """Why two processes do not meet at a port of this machine."""
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        join_group("cpu")
    except TrainingError as error:
        return str(error)
    return "met"


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = result_of(meet, port)
    assert f"127.0.0.1:{port}: the port is in use" in said
    assert "--master-port" in said


def started(rank: int, world: int, port: int, out: str) -> None:
    """One of the processes of a start, which the last of them does not survive. torchrun has a store for all starts."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")
    place = join_group("cpu")
    assert add_up([1], place) == [world]
    if rank == world - 1:
        os._exit(0)
    try:
        with explain_lost_process():
            while True:
                add_up([1], place)
    except TrainingError as error:
        Path(f"{out}/{world}-{rank}").write_text(str(error))
    os._exit(0)


def test_processes_that_are_started_again_do_not_wait_for_those_before(tmp_path: Path) -> None:
    """With as many as before, and with fewer; what is left by those before is still in the store of torchrun."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for world in (3, 3, 2):
        arguments = (world, store.port, str(tmp_path))
        multiprocessing.start_processes(started, arguments, nprocs=world, start_method=FORKING.get_start_method())
        for rank in range(world - 1):
            said = tmp_path / f"{world}-{rank}"
            assert "another process of this run is gone: " in said.read_text()
            assert "by itself with --max-restarts of torchrun" in said.read_text()
            said.unlink()


# -- what is known to all ---------------------------------------------------------------------------------------------


def known_to_all(rank: int, world: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = join_group("cpu")
    assert from_first({"precision": "bf16"} if rank == 0 else None, place) == {"precision": "bf16"}
    assert add_up([rank, 1], place) == [sum(range(world)), world]
    require_same_step(3, 3, place)
    with pytest.raises(TrainingError, match=r"different steps: \[3, 5\]"):
        require_same_step(3, 5 if rank == 1 else 3, place)
    vote = Vote(place)
    asked = [0, 15 if rank == 1 else 0, 2 if rank == 0 else 0, 0, 0]
    assert [vote.cast(number) for number in asked] == [0, 0, 15, 2, 0]
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(rank + 5))
    share_statistics_(own_statistics(norm), place)
    assert norm.running_mean.tolist() == [6.0] * 3
    assert norm.running_var.tolist() == [1.0] * 3
    if rank == 0:
        time.sleep(0.5)
        Path(f"{out}/written").touch()
    wait_for_all(place)
    assert Path(f"{out}/written").exists(), "the others did not wait"
    leave_group(place)
    Path(f"{out}/{rank}").touch()


def test_processes_agree_by_way_of_memory(tmp_path: Path) -> None:
    arguments = (3, free_port(), str(tmp_path))
    multiprocessing.start_processes(known_to_all, arguments, nprocs=3, start_method=FORKING.get_start_method())
    assert len(list(tmp_path.iterdir())) == 4
    alone = Place(0, 1, torch.device("cpu"))
    assert Vote(alone).cast(15) == 15
    assert from_first(3, alone) == 3
    assert add_up([1, 2], alone) == [1, 2]


def stopped(rank: int, world: int, port: int, config: TrainConfig, out: str) -> None:
    """Train; one process, and not the first, is asked to stop in its third step."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    learn, calls = TowerTrainer.learn, []

    def signalling(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return learn(*args, **kwargs)

    TowerTrainer.learn = signalling  # type: ignore[method-assign]
    try:
        train(config)
    except StoppedError as error:
        Path(f"{out}/{rank}").write_text(str(error))


def test_all_stop_after_the_same_step_when_one_is_asked(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", device="cpu", checkpoint_every=100, log_every=1)
    arguments = (2, free_port(), config, str(tmp_path))
    multiprocessing.start_processes(stopped, arguments, nprocs=2, start_method=FORKING.get_start_method())
    for rank in range(2):
        assert "was stopped by SIGTERM after step 4 of 8" in (tmp_path / str(rank)).read_text()
    assert Checkpoints(config.out).step() == 4
    lines = [line["step"] for line in read_metrics(config.out) if line["event"] == "train"]
    assert lines == [1, 2, 3, 4], "both processes wrote metrics, or neither"


def trained(rank: int, world: int, port: int, config: TrainConfig) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(config)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["sync", "local"])
def test_a_student_with_batch_norm_does_not_depend_on_the_number_of_processes(
    image_store: Store, text_store: Store, tmp_path: Path, batch_norm: str
) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "one", device="cpu", batch_norm=batch_norm, accumulate=2, ema=0.5, threads=1
    )
    train(config)
    two = replace(config, out=str(tmp_path / "two"), gradient_checkpointing=True)
    arguments = (2, free_port(), two)
    multiprocessing.start_processes(trained, arguments, nprocs=2, start_method=FORKING.get_start_method())
    one, other = (Checkpoints(out).load() for out in (config.out, two.out))
    assert one
    assert other
    differences = []
    for find in (lambda state: state["image"]["model"], lambda state: state["image"]["ema"]["weights"]):
        mine, theirs = find(one), find(other)
        assert mine.keys() == theirs.keys()
        assert any("running_var" in name for name in mine)
        differences += [float((mine[name] - theirs[name]).abs().max()) for name in mine]
    assert max(differences) < 0.02 if batch_norm == "sync" else max(differences) > 0.1


def validated(rank: int, world: int, port: int, sets: tuple[str, ...], texts: str, out: str) -> None:
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    place = join_group("cpu")
    spec = student_spec(STUDENT, Store(texts).schema.teacher, 32)
    torch.manual_seed(0)
    towers = {"": (build_student(spec), None), "_ema": (build_student(spec), None)}
    scores = Validation(sets, Store(texts), spec, place, torch.float32).run(towers)
    Path(f"{out}/{world}-{rank}").write_text(json.dumps(scores))
    leave_group(place)


@pytest.mark.slow
def test_images_of_validation_are_shared_and_counted_together(
    cifar10: str, prompt_store: Store, tmp_path: Path
) -> None:
    for world in (1, 3):
        arguments = (world, free_port(), (cifar10,), prompt_store.path, str(tmp_path))
        multiprocessing.start_processes(validated, arguments, nprocs=world, start_method=FORKING.get_start_method())
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found.keys() == {"1-0", "3-0", "3-1", "3-2"}
    assert found["1-0"].keys() == {"cifar10", "cifar10_ema"}
    assert found["1-0"]["cifar10"] != found["1-0"]["cifar10_ema"]
    assert all(scores == found["1-0"] for scores in found.values())


# -- where a process is -----------------------------------------------------------------------------------------------


def on_gpus(count: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """A machine of `count` GPUs, as far as finding one's place goes."""
    monkeypatch.setattr("dimefm.training.distributed.choose_device", lambda device: device or "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_each_process_has_the_gpu_of_its_number_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(4, monkeypatch, RANK="7", WORLD_SIZE="8", LOCAL_RANK="3")
    assert find_place(None) == Place(7, 8, torch.device("cuda:3"))
    assert find_place("cpu") == Place(7, 8, torch.device("cpu"))


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a launcher shows each process one GPU."""
    on_gpus(1, monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="3")
    with pytest.raises(TrainingError, match=r"LOCAL_RANK.*sees 1 GPU \(CUDA_VISIBLE_DEVICES=3\)(?s:.*)nproc"):
        find_place(None)


def test_a_group_on_gpus_is_bound_to_the_device_and_has_gloo_beside_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(2, monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    events: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(("set_device", device)))
    monkeypatch.setattr("dimefm.training.distributed.rendezvous", lambda *_, **options: iter([("a store", 1, 2)]))
    monkeypatch.setattr("dimefm.training.distributed.own_store", lambda *given: given[0])
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: events.append((backend, options))
    )
    place = join_group("cuda")
    (first, device), (backend, options) = events
    assert (first, device) == ("set_device", place.device)
    assert backend == "cpu:gloo,cuda:nccl"
    assert (options["store"], options["rank"], options["world_size"]) == ("a store", 1, 2)
    assert options["device_id"] == torch.device("cuda:1")
