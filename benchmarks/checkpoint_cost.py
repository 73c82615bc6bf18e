"""What a checkpoint costs a training loop: how long it stands still, and how its steps slow down while one is written.

The loop is of the main thread and never waits: many small operations, as a loop gives them to a GPU. So it shows each
moment in which the thread that writes has the interpreter.
"""

import resource
import tempfile
import time
from collections.abc import Callable

import click
import torch

from benchmarks.measure import machine, median, table
from dimefm.training.checkpoint_writer import CheckpointWriter
from dimefm.training.checkpoints import Checkpoints

_WIDTH = 1024


@click.command()
@click.option("--parameters", default=90, show_default=True, help="Of the student, in millions.")
@click.option("--count", default=4, show_default=True, help="Checkpoints; the first needs new memory.")
@click.option("--operations", default=3000, show_default=True, help="Of a step of the loop.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write to, for the storage that is meant.")
def checkpoint_cost(parameters: int, count: int, operations: int, out: str | None) -> None:
    """A checkpoint of a student with AdamW: seconds of the loop, of its steps and of the thread; memory."""
    torch.set_num_threads(1)
    state = _state(parameters)
    size = sum(tensor.nbytes for part in state.values() for tensor in part)
    small = torch.zeros(8)

    def step() -> None:
        for _ in range(operations):
            small.add_(1)

    before, rows = _peak(), list[tuple[str, ...]]()
    with tempfile.TemporaryDirectory(dir=out) as folder, CheckpointWriter(checkpoints := Checkpoints(folder)) as writer:
        for number in range(1, count + 1):
            quiet = [_seconds(step)[0] for _ in range(20)]
            still, still_cpu = _seconds(lambda: writer.begin(number, state))  # noqa: B023
            began, began_cpu = time.perf_counter(), _others()
            busy = [_seconds(step)[0] for _ in iter(checkpoints.step, number)]
            wall, cpu = time.perf_counter() - began, _others() - began_cpu
            slower = f"{median(busy) / median(quiet):.2f}" if busy else "-"
            rows.append((f"{number}", f"{still:.3f}", f"{still_cpu:.3f}", f"{wall:.2f}", f"{cpu:.2f}", slower))
    click.echo(f"a state of {size / 1e9:.2f} GB; the peak of memory rose by {(_peak() - before) / 1e9:.2f} GB")
    head = (
        "checkpoint", "the loop stands still, s", "its CPU, s", "written and on disk after, s", "the thread's CPU, s",
        "a step meanwhile, of one before",
    )  # fmt: skip
    click.echo(table(head, rows))
    click.echo(machine())


def _state(millions: int) -> dict[str, list[torch.Tensor]]:
    """As large as a trainer's: weights, and two numbers of AdamW for each."""
    layers = millions * 10**6 // _WIDTH**2
    return {name: [torch.ones(_WIDTH, _WIDTH) for _ in range(layers)] for name in ("model", "exp_avg", "exp_avg_sq")}


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of a core."""
    began, cpu = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - began, time.thread_time() - cpu


def _others() -> float:
    """CPU seconds of all threads but this one."""
    return time.process_time() - time.thread_time()


def _peak() -> int:
    """Bytes of memory at the most, until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
