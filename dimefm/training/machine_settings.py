"""What a training run leaves to the machine: precision, torch threads, loader processes.

Rank 0 decides the first two once, run.json keeps them, and a run that goes on elsewhere takes them from there.
"""

from __future__ import annotations

from dataclasses import replace

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
_ENOUGH_AHEAD = 4 * 2**30  # bytes; where batches are so large, two of each process are ahead enough
_CORES_PER_LOADER, _MOST_LOADERS = 8, 16
_MEMORY_SHARE = 4  # of all memory, the part that batches read ahead may take
_FILES_OF_BATCH, _FILES_SHARE = 8, 4  # a descriptor for each tensor of it; the part of all that batches may take


def decide_settings(config: TrainConfig, place: Place, allow_changes: tuple[str, ...]) -> tuple[TrainConfig, list[str]]:
    """`config` with precision and threads decided, the same in all processes, and what its user should know of it.

    A run that goes on keeps what it began with; a field in `allow_changes` is decided anew.
    """
    decided = from_first(_decide(config, place, allow_changes) if place.first else None, place)
    assert decided is not None
    precision, threads, notes = decided
    return replace(config, precision=precision, threads=threads), notes


def _decide(config: TrainConfig, place: Place, allow_changes: tuple[str, ...]) -> tuple[Precision, int, list[str]]:
    device, notes = str(place.device), list[str]()
    run = run_to_resume(config.out)
    before = TrainConfig.parse(run.config, config.out) if run else None
    best = choose_precision(device)
    precision = config.precision
    if precision == "auto":
        precision = best
        if before and before.precision != "auto" and "precision" not in allow_changes:
            precision = before.precision
        if precision != best:
            notes.append(
                f"precision stays {precision}, with which this run began; {best} is faster on this machine: "
                "--allow-changes precision goes on with that"
            )
    elif emulates(precision, device):
        notes.append(f"{precision} is emulated on this machine and far slower than {best} (--precision auto)")
    threads = config.threads
    if threads is None and before and "threads" not in allow_changes:
        threads = before.threads
        if threads and device == "cpu" and threads > cpus():
            notes.append(f"torch computes with {threads} threads, as when this run began, on {cpus()} cores")
    if run and run.machine and run.machine != describe(device):
        notes.append(
            f"this run began on {run.machine} and goes on on {describe(device)}, which rounds in another way: "
            "it is not bit for bit what either alone would give"
        )
    if run and run.processes and run.processes != place.world:
        notes.append(
            f"this run began with {run.processes} processes and goes on with {place.world}: batches and losses are the "
            "same but for rounding; statistics of batch norm and drop-path are of each process's own images"
        )
    return precision, threads or choose_threads(), notes


def choose_threads() -> int:
    """Torch threads of a training process: all of its cores, or fewer where torch was told so (OMP_NUM_THREADS).

    None is left for the loader: it decodes an image in a fiftieth of the time that a CPU trains on it, and threads that
    wait only briefly (dimefm.system.machine.wait_briefly) let it have that.
    """
    return max(1, min(torch.get_num_threads(), cpus() // processes_here()))


def choose_loaders(asked: int | None, device: str, batch_bytes: int) -> tuple[int, int]:
    """Loader processes of a training process, and how many batches each reads ahead; `asked`, or by cores and memory.

    A GPU eats more than one process decodes: all cores but one of each rank, up to 16. A CPU does not: one process for
    each eight cores. Batches are handed over through /dev/shm, each tensor by a file descriptor. Raises TrainingError
    where there is too little of either: torch would die of the first and wait for ever after the second.
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
    if room < 2 * workers:  # one batch that is ready and one that is being made
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
