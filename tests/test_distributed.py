"""Several processes train as one would with the whole batch: real gloo process groups on this machine."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dimefm import losses
from dimefm.checkpoint import Checkpoints
from dimefm.distributed import ALONE, Place, average, gather_batch, join_group, leave_group
from dimefm.errors import TrainingError
from dimefm.objective import LossConfig, Objective
from dimefm.runlog import read_metrics
from tests.processes import FORKING, result_of

IMAGES, TEXTS, WIDTH = 8, 12, 6
OBJECTIVES = {
    "vl": LossConfig(vl=1, pvl=0),
    "pvl": LossConfig(vl=0, pvl=1),
    "udist": LossConfig(vl=0, pvl=0, udist=1),
    "pvl, udist without the diagonal": LossConfig(vl=0, pvl=0.5, udist=0.5, mask_diagonal=True),
    "cosine": LossConfig(vl=0, pvl=0, cosine=1),
    "centred": LossConfig(vl=0, pvl=0, centred=1),
    "contrastive": LossConfig(vl=0, pvl=0, contrastive=1),
    "scores with a queue": LossConfig(vl=0.7, pvl=0.3, udist=0.1, mask_diagonal=True, queue=11),
    "all with a queue and a learned scale": LossConfig(
        vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5, contrastive=0.2, queue=5, logit_scale="learned", scale=20.0
    ),
}


def units(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator), dim=-1)


def two_steps(config: LossConfig, place: Place, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """What the second step finds, for which the queue has rows of the first: the loss and its parts, the gradients of
    the tower and of the scale."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, WIDTH).to(place.device, dtype)
    tower = DistributedDataParallel(model) if place.world > 1 else model
    objective = Objective(config, teacher_scale=100.0, dim=WIDTH, mean_D=units(1, 5)[0] / 2).to(place.device, dtype)
    text_TD, pair_GD = (units(rows, 3).half().to(place.device, dtype) for rows in (TEXTS, IMAGES))
    pair = pair_GD, torch.tensor([4, 1, -1, 4, 0, 7, -1, 2], device=place.device)
    inputs = torch.randn(2, IMAGES, 10, generator=torch.Generator().manual_seed(1)).to(place.device, dtype)
    for step in range(2):
        tower.zero_grad()
        objective.zero_grad()
        half_GD = units(IMAGES, 10 + step).half().to(place.device)
        teacher_GD = gather_batch(half_GD[place.rows], place).to(dtype)
        assert torch.equal(teacher_GD, half_GD.to(dtype)), "not in the order of the global batch"
        student_BD = F.normalize(tower(inputs[step][place.rows]), dim=-1)
        loss, parts = objective(teacher_GD, student_BD, text_TD, pair, place)
        loss.backward()
        objective.after_step(teacher_GD, student_BD.detach(), place)
    values = [loss.detach(), *parts.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if objective.log_scale is not None and objective.log_scale.grad is not None:
        values.append(objective.log_scale.grad)
    for value in values:
        average(value, place)
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
    assert [len(values) for values in expected.values()] == [4, 4, 4, 5, 4, 4, 4, 6, 11]
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, values in expected.items():
            for mine, whole in zip(found[name], values, strict=True):
                torch.testing.assert_close(mine, whole, rtol=0, atol=1e-10, msg=f"{name} on {rank}: {mine}, {whole}")


def test_torchrun_trains_on_two_processes(tiny_run: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = [*launch, "-m", "dimefm", *tiny_run, "--out", out, "--device", "cpu"]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert Checkpoints(out).step() == 8
    lines = [line for line in read_metrics(out) if line["event"] == "train"]
    assert [line["step"] for line in lines] == [8], "both processes wrote metrics, or neither"


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
