"""What torchrun does with a run that loses a process or a machine, or is stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dimefm.training.checkpoints import Checkpoints
from dimefm.training.read_metrics import read_metrics
from tests.tiny_training import same, weights
from tests.training.test_distributed import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # most of it imports, of which a busy machine takes minutes

STEPS = 150
Agent = subprocess.Popen[bytes]  # the torchrun of one machine


@pytest.fixture(scope="module")
def torchrun(tiny_run: list[str]) -> Iterator[Callable[..., Agent]]:
    """Starts torchrun with words of its own for a run folder. All machines are this one."""
    rest = ["--max-steps", str(STEPS), "--epochs", "100", "--log-every", "1", "--device", "cpu"]
    agents = []

    def start(out: str, *words: str, every: int = 1000) -> Agent:
        launch = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "dimefm", *tiny_run, *rest]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        agents.append(subprocess.Popen([*launch, "--checkpoint-every", str(every), "--out", out], env=environment))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.poll() is None:  # a test has failed
            for rank in ranks_of(agent):
                os.kill(rank, signal.SIGKILL)
            agent.kill()
            agent.wait()


@pytest.fixture(scope="module")
def whole(torchrun: Callable[..., Agent], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two processes that nothing happens to."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    assert torchrun(out, "--nproc-per-node", "2", "--master-port", str(free_port())).wait() == 0
    assert Checkpoints(out).step() == STEPS
    return out


def losses(out: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(out) if line["event"] == "train"]


def wait_for_more_steps(out: str, *agents: Agent) -> None:
    goal = len(losses(out)) + 20
    while len(losses(out)) < goal:
        assert all(agent.poll() is None for agent in agents), "ended before its time"
        time.sleep(0.05)


def ranks_of(agent: Agent) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for file in Path(f"/proc/{agent.pid}/task").glob("*/children") for pid in file.read_text().split()]


def test_a_run_on_two_machines_goes_on_by_itself_when_a_process_is_lost(
    torchrun: Callable[..., Agent], whole: str, tmp_path: Path
) -> None:
    out, meeting = str(tmp_path / "run"), ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    words = ["--nnodes", "2", "--nproc-per-node", "1", *meeting, "--max-restarts", "3"]
    agents = [torchrun(out, *words, every=10) for _ in range(2)]
    wait_for_more_steps(out, *agents)
    (rank,) = ranks_of(agents[1])
    os.kill(rank, signal.SIGKILL)
    assert [agent.wait() for agent in agents] == [0, 0]
    assert losses(out) == losses(whole)
    assert same(weights(out), weights(whole))


def test_a_run_on_two_machines_goes_on_by_itself_when_one_is_lost(
    torchrun: Callable[..., Agent], tmp_path: Path
) -> None:
    out, meeting = str(tmp_path / "run"), ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    words = ["--nnodes", "1:2", "--nproc-per-node", "1", *meeting, "--max-restarts", "3"]
    first = torchrun(out, *words, "--rdzv-conf", "is_host=1", every=10)
    lost = torchrun(out, *words, "--rdzv-conf", "is_host=0", every=10)
    wait_for_more_steps(out, first, lost)
    (rank,) = ranks_of(lost)
    lost.kill()
    os.kill(rank, signal.SIGKILL)
    assert first.wait() == 0
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))


def test_a_stop_of_torchrun_keeps_a_checkpoint_from_which_the_same_command_goes_on(
    torchrun: Callable[..., Agent], whole: str, tmp_path: Path
) -> None:
    """As Slurm sends the signal, to all, and as Kubernetes does, to torchrun alone."""
    out = str(tmp_path / "run")
    words = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    for to_all in (True, False):
        agent = torchrun(out, *words)
        wait_for_more_steps(out, agent)
        for pid in [agent.pid, *(ranks_of(agent) if to_all else ())]:
            os.kill(pid, signal.SIGTERM)
        assert agent.wait() == 1
        assert 0 < Checkpoints(out).step() == len(losses(out)) < STEPS
    assert torchrun(out, *words).wait() == 0
    assert losses(out) == losses(whole)
    assert same(weights(out), weights(whole))
