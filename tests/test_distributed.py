"""Several processes train as one would with the whole batch: real gloo process groups on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dimefm.checkpoint import Checkpoints
from dimefm.distributed import gather_batch, join_group, leave_group
from dimefm.errors import TrainingError
from dimefm.objective import LossConfig, Objective
from dimefm.runlog import read_metrics
from tests.processes import FORKING, result_of

LOSS = LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5)
IMAGES, TEXTS, WIDTH = 8, 12, 6


def inputs() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model, images, and teacher embeddings of images and texts: the same in every process."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(10, WIDTH).double()
    images = torch.randn(IMAGES, 10, dtype=torch.float64, generator=generator)
    teacher, texts = (
        F.normalize(torch.randn(n, WIDTH, dtype=torch.float64, generator=generator), dim=-1) for n in (IMAGES, TEXTS)
    )
    return model, images, teacher, texts


def objective() -> Objective:
    return Objective(LOSS, teacher_scale=100.0, dim=WIDTH, mean_D=None)


def one_process() -> list[torch.Tensor]:
    model, images, teacher, texts = inputs()
    objective()(teacher, F.normalize(model(images), dim=-1), texts)[0].backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def one_of_many(rank: int, world: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    place = join_group("cpu")
    model, images, teacher, texts = inputs()
    tower = DistributedDataParallel(model)
    student = gather_batch(F.normalize(tower(images[rank::world]), dim=-1), place)
    gathered = gather_batch(teacher[rank::world], place)
    assert torch.equal(gathered, teacher), "the rows are not in the order of the global batch"
    objective()(gathered, student, texts)[0].backward()
    torch.save([p.grad for p in model.parameters()], f"{out}/{rank}.pt")
    leave_group(place)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_process_with_the_whole_batch(world: int, tmp_path: Path) -> None:
    arguments = (world, free_port(), str(tmp_path))
    multiprocessing.start_processes(one_of_many, arguments, nprocs=world, start_method=FORKING.get_start_method())
    expected = one_process()
    assert len(expected) == 2
    for rank in range(world):
        for mine, whole in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            torch.testing.assert_close(mine, whole, rtol=0, atol=1e-10)


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
