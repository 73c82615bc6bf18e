"""Work in processes forked from a step's: a training run begins there as a user's does, with nothing begun on the GPU
when it forks its own.

The step must not have computed anything before, since the threads of that would be missing in the forked process, nor
have touched the GPU.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from benchmarks.gpu.kit import Kit

_T = TypeVar("_T")
_FORK = multiprocessing.get_context("fork")
_SPARE = 3.0  # seconds that the step keeps to tell of what took too long


def forked(kit: Kit, work: Callable[[], _T]) -> _T:
    """What `work` gives in a process of its own. Raises RuntimeError as `together` does."""
    return together(kit, [work])[0]


def together(kit: Kit, works: Sequence[Callable[[], _T]], most: float = math.inf) -> list[_T]:
    """What each gives, all at once, each in a process of its own.

    Raises RuntimeError with the traceback of the first that fails, and where they take longer than `most` seconds or
    than the step has; all are ended then.
    """
    allowed = min(most, kit.left() - _SPARE)
    until = time.monotonic() + allowed
    pipes = [_FORK.Pipe(duplex=False) for _ in works]
    processes = [_FORK.Process(target=_work, args=(work, pipe[1])) for work, pipe in zip(works, pipes, strict=True)]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    found: dict[Connection, _T] = {}
    try:
        while len(found) < len(works):
            ready = wait([mine for mine, _ in pipes if mine not in found], max(0.0, until - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{len(works) - len(found)} of {len(works)} were not done in {allowed:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                found[connection] = _received(kit, connection)
        for process in processes:
            process.join(_SPARE)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[mine] for mine, _ in pipes]


def _received(kit: Kit, connection: Connection) -> _T:
    try:
        value, error, gpu_bytes = connection.recv()
    except EOFError:
        raise RuntimeError("a process ended without a word") from None
    kit.gpu_bytes = max(kit.gpu_bytes, gpu_bytes)
    if error:
        raise RuntimeError(error)
    return value  # type: ignore[no-any-return]


def _work(work: Callable[[], object], connection: Connection) -> None:
    value, error = None, ""
    try:
        value = work()
    except BaseException:
        error = traceback.format_exc()
    gpu_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    connection.send((value, error, gpu_bytes))
    if error:
        os._exit(1)  # with NCCL an orderly end would wait for the others
