"""Steps in processes of their own, so that an error of CUDA, a leak or a hang in one is not the next one's.

They are forked from a process that has imported the libraries and never touches a GPU. Each has until a moment in time;
then it and all that it started in its group are killed, after it has told in the log where it was.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results, Step
from benchmarks.gpu.sizes import Sizes

_FORKING = multiprocessing.get_context("forkserver")
_LIBRARIES = [
    "benchmarks.gpu.inputs",
    "benchmarks.training_steps",
    "dimefm.retrieval.exact_search",
    "dimefm.training.validation",
    "dimefm.caching.plan",
]
_ABSENT = ("ray", "faiss")  # what such a machine does not have, and no step may want
_GRACE = 10.0  # seconds that a step which is done has to end


def prepare() -> None:
    """Begin to import the libraries, beside what this process does."""
    _FORKING.set_forkserver_preload(_LIBRARIES)
    from multiprocessing import forkserver

    forkserver.ensure_running()


def ready() -> None:
    """Wait until the libraries are imported there."""
    process = _FORKING.Process(target=os.getpid)
    process.start()
    process.join()


def run(
    function: str, step: Step, results: Results, *, device: str, sizes: Sizes, folder: Path, log: Path, until: float
) -> None:
    """Run a step, `function` as "module:name", and take what it sends until it ends or is stopped at
    `until`, a time of time.monotonic."""
    results.begin(step)
    began = time.monotonic()
    mine, theirs = _FORKING.Pipe(duplex=False)
    arguments = (function, theirs, device, sizes, str(folder), dict(results.known), str(log), until)
    process = _FORKING.Process(target=_work, args=arguments)
    process.start()
    theirs.close()
    try:
        _listen(mine, step, results, until)
    finally:
        _end(process, at_once=step.state != "done")
        step.seconds = round(time.monotonic() - began, 1)
        results.write()


def _listen(connection: Connection, step: Step, results: Results, until: float) -> None:
    """Take messages until the last; the step's state is set by how it ended."""
    while connection.poll(max(0.0, until - time.monotonic())):
        try:
            kind, content = connection.recv()
        except EOFError:
            if step.state == "running":
                results.take("failed", "its process ended without a word: see log.txt")
            return
        if kind == "done":
            step.state = "done" if step.state == "running" else step.state
            return
        results.take(kind, content)
    step.state = "stopped"


def _end(process: BaseProcess, *, at_once: bool) -> None:
    if not at_once:
        process.join(_GRACE)
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR1)  # where it is, into the log
        process.join(0.5)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()


def _work(
    function: str, connection: Connection, device: str, sizes: Sizes, folder: str, known: dict[str, float], log: str,
    until: float,
) -> None:  # fmt: skip
    """In the new process: the step, its errors, its memory, and that nothing was imported that must not be."""
    with suppress(PermissionError):
        os.setpgid(0, 0)
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    print(f"\n== {function}", flush=True)
    from benchmarks.gpu.inputs import Inputs
    from benchmarks.gpu.kit import Kit

    kit = Kit(device, sizes, Inputs(Path(folder), sizes), known, until, connection.send)
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(kit)
    except BaseException:
        traceback.print_exc()
        connection.send(("failed", traceback.format_exc()))
    _memory(kit, connection)
    kit.require("neither ray nor faiss in the process", not any(name in sys.modules for name in _ABSENT))
    sys.stdout.flush()
    connection.send(("done", None))


def _memory(kit: Any, connection: Connection) -> None:
    import torch

    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]  # getrusage's peak is the parent's too
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    at = f"its largest child process {children:.1f} GB"
    kit.line("host memory, peak", int(status.split()[0]) * 1024 / 1e9, "GB", at)
    if kit.device.type == "cuda":
        with suppress(RuntimeError):  # of a context that an error has spoilt
            connection.send(("card", torch.cuda.get_device_name()))
            peak = max(kit.gpu_bytes, torch.cuda.max_memory_allocated())
            kit.line("GPU memory, peak of a process", peak / 1e9, "GB", "as torch allocated it")
