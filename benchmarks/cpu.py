"""What a CPU does with a small student: by precision, by torch threads, by how idle threads wait, with a neighbour."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from benchmarks.cpu_worker import BATCH, SIDE, STUDENT
from benchmarks.measure import machine, median, table
from dimefm.system.machine import choose_precision, cpus, describe

WAITING = {"torch's": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "brief": {"GOMP_SPINCOUNT": "1000"}}


@click.command()
@click.option("--seconds", default=6.0, show_default=True, help="Of each measurement.")
@click.option("--count", default=3, show_default=True, help="Rounds.")
def cpu(seconds: float, count: int) -> None:
    """Images/s of a student's forward and backward pass, with and without a busy neighbour on one core."""
    cores = cpus()
    cases = [("bf16", cores, "brief"), *(("fp32", threads, "brief") for threads in sorted({1, max(1, cores - 1)}))]
    cases += [("fp32", cores, waiting) for waiting in WAITING]
    found: dict[tuple[str, int, str], dict[bool, list[float]]] = {case: {False: [], True: []} for case in cases}
    for _ in range(count):
        for case, rates in found.items():
            for busy, values in rates.items():
                with _neighbour(busy):
                    values.append(_rate(*case, seconds))
    rows = [
        (precision, str(threads), waiting, f"{median(rates[False]):,.0f}", f"{median(rates[True]):,.0f}")
        for (precision, threads, waiting), rates in found.items()
    ]
    click.echo(table(("precision", "threads", "waiting", "images/s", "with a busy neighbour"), rows))
    student = f"{STUDENT} at {SIDE} px, batches of {BATCH}, medians of {count} rounds of {seconds:g} s"
    click.echo(f"{machine()}, {describe('cpu')}, precision auto: {choose_precision('cpu')}; {student}")


def _rate(precision: str, threads: int, waiting: str, seconds: float) -> float:
    words = [sys.executable, "-m", "benchmarks.cpu_worker", precision, str(threads), str(seconds)]
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return float(
        subprocess.run(words, env={**kept, **WAITING[waiting]}, capture_output=True, text=True, check=True).stdout
    )


@contextmanager
def _neighbour(busy: bool) -> Iterator[None]:
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    cpu()
