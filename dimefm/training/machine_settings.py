"""Settings of a run that depend on the machine: precision, torch threads, loader processes; and what older runs did.

Rank 0 decides the first two when a run begins, run.json keeps them, and a run that goes on elsewhere takes them from
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cache_schemas.identity import Precision
from dimefm.errors import TrainingError
from dimefm.system.machine import (
    available_memory,
    choose_precision,
    cpus,
    describe,
    emulates,
    free_shared_memory,
    open_files,
    processes_here,
)
from dimefm.system.progress import amount
from dimefm.training.config import TrainConfig
from dimefm.training.distributed import Place, from_first
from dimefm.training.run_folder import run_to_resume

_AHEAD = 4  # batches that each loader process reads ahead
_ENOUGH_AHEAD = 4 * 2**30  # bytes that all loader processes read ahead at most; but two batches each at least
_CORES_PER_LOADER, _MOST_LOADERS = 8, 16
_MEMORY_SHARE = 4  # batches that are read ahead may take a quarter of the memory
_FILES_OF_BATCH = 8  # file descriptors: one for each tensor of a batch
_FILES_SHARE = 4  # batches may take a quarter of the descriptors
_DIFFERS = {
    **dict.fromkeys(("sync", "frozen"), "drop-path and dropout differ, which each process draws for its own images"),
    "local": "batch norm, drop-path and dropout differ, which see each process's own images",
}
"""What depends on the number of processes, by the statistics of batch norm."""


def decide_settings(config: TrainConfig, place: Place, allow_changes: tuple[str, ...]) -> tuple[TrainConfig, list[str]]:
    """`config` with precision, threads and batch norm decided, the same in all processes; and notes for the user.

    A run that goes on keeps what it began with; a field in `allow_changes` is decided anew.
    """
    decided = from_first(_decide(config, place, allow_changes) if place.first else None, place)
    assert decided is not None
    settings, notes = decided
    return replace(config, **settings), notes


def _decide(config: TrainConfig, place: Place, allow_changes: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    run, notes = run_to_resume(config.out), list[str]()
    before = TrainConfig.parse(run.config, config.out) if run else None
    device, here = str(place.device), describe(str(place.device))
    precision = _decide_precision(config, None if "precision" in allow_changes else before, device, notes)
    threads = _decide_threads(config, None if "threads" in allow_changes else before, device, notes)
    kept = None if "batch_norm" in allow_changes else before
    batch_norm = config.batch_norm or (kept.batch_norm or "local" if kept else "sync")  # an older run says nothing
    if config.workers and config.workers > (cores := max(1, cpus() // processes_here())):
        notes.append(f"--workers {config.workers:,}: more processes that read images than cores here ({cores})")
    if run and run.machine and run.machine != here:
        notes.append(
            f"this run began on {run.machine} and continues on {here}, which rounds in another way: "
            "the student is not bit for bit what either of them alone would give"
        )
    if run and run.processes and run.processes != place.world:
        notes.append(
            f"this run began with {run.processes} processes and continues with {place.world}: batches and losses are "
            f"the same but for rounding; {_DIFFERS[batch_norm]}"
        )
    return {"precision": precision, "threads": threads, "batch_norm": batch_norm}, notes


def _decide_precision(config: TrainConfig, before: TrainConfig | None, device: str, notes: list[str]) -> Precision:
    """The precision that the user gave, else that of the config `before`, else the best here; and notes on it."""
    best = choose_precision(device)
    if config.precision != "auto":
        if emulates(config.precision, device):
            slow = f"{config.precision} is emulated on this machine and far slower than {best}"
            notes.append(f"{slow} (--precision auto)")
        return config.precision
    if before is None or before.precision == "auto":
        return best
    if before.precision != best:
        notes.append(
            f"precision stays {before.precision}, with which this run began; {best} is faster on this machine, and "
            "--allow-changes precision goes on with it"
        )
    return before.precision


def _decide_threads(config: TrainConfig, before: TrainConfig | None, device: str, notes: list[str]) -> int:
    """The number of torch threads that the user gave, else that of the config `before`, else all that fit here."""
    if config.threads is not None:
        return config.threads
    if before is None or not before.threads:
        return choose_threads()
    if device == "cpu" and before.threads > cpus():
        notes.append(f"torch computes with {before.threads} threads, as when this run began, on {cpus()} cores")
    return before.threads


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Compute with that many torch threads within the block; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads() -> int:
    """Torch threads of a training process: all of its cores, or fewer if OMP_NUM_THREADS says so.

    No core is left for the loader: a CPU trains on an image for fifty times as long as it takes to decode it, and
    threads that wait only briefly (`wait_briefly` in system/machine.py) let the loader have that.
    """
    return max(1, min(torch.get_num_threads(), cpus() // processes_here()))


def choose_loaders(asked: int | None, device: str, batch_bytes: int) -> tuple[int, int]:
    """The number of loader processes of a training process, and how many batches each reads ahead. The number is
    `asked`, or follows from cores and memory.

    A GPU needs more images than one process decodes: it gets all cores of its rank but one, up to 16. A CPU does not:
    it gets one process for each eight cores. Batches are handed over through /dev/shm, each tensor by a file
    descriptor. Raises TrainingError if there are too few of either: without memory torch would die, and without
    descriptors it would wait for ever.
    """
    cores = max(1, cpus() // processes_here())
    wanted = min(_MOST_LOADERS, max(1, cores - 1) if device.startswith("cuda") else max(1, cores // _CORES_PER_LOADER))
    workers = wanted if asked is None else asked
    shared = free_shared_memory()
    if workers == 0 or shared is None:
        return workers, _AHEAD
    room = min(shared, available_memory() // _MEMORY_SHARE) // processes_here() // batch_bytes
    if asked is None:
        workers = max(1, min(workers, room // 2))
    if room < 2 * workers:  # each has one batch that is ready and one that it makes
        what = f"/dev/shm has {amount(shared)} left, and {workers} loader processes"
        what += f" need {amount(2 * workers * batch_bytes * processes_here())} of it for their batches"
        remedy = "make it larger (docker run --shm-size=8g), or give a smaller --workers; 0 reads without it"
        raise TrainingError(what, remedy=remedy)
    files = open_files() // _FILES_SHARE // _FILES_OF_BATCH
    if files < workers:
        what = f"{workers} loader processes need more open files than this process may have ({open_files()})"
        raise TrainingError(what, remedy="raise the limit (ulimit -n 4096), or give a smaller --workers; 0 needs none")
    enough = max(2, _ENOUGH_AHEAD // (workers * batch_bytes))
    return workers, min(_AHEAD, enough, room // workers - 1, files // workers)
