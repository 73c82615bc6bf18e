"""One model in a process of its own: it loads, warms up, and then measures when it is asked to.

All workers live at the same time and only one of them computes, so that models can be measured in turns.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schemas.latency import Tower
from dimefm.errors import DimefmError
from dimefm.latency.subject import Facts, Loaded, Subject, loading
from dimefm.system import library_warnings

_PROCESSES = multiprocessing.get_context("forkserver")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SLOW = 1.0  # seconds of a call that is not repeated for its own sake
_WARM, _WARM_CALLS = 0.3, 3
_LEAST = 2  # calls of a round
_GRACE = 10.0  # seconds in which a worker that is done ends by itself, and tidies up


@dataclass(frozen=True)
class Asked:
    """Calls of a tower with a batch, for so many seconds."""

    tower: Tower
    batch: int
    seconds: float


class Worker:
    """The process of a subject, as its parent sees it."""

    def __init__(self, subject: Subject, threads: int, batches: Sequence[int], seconds: float) -> None:
        """It warms up for no longer than `seconds` with each batch."""
        self.subject = subject
        self._pipe, end = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_work, args=(end, subject, threads, batches, seconds), daemon=True)
        self._process.start()
        end.close()

    def facts(self) -> Facts:
        """When the model is loaded and warm. Raises DimefmError if it cannot be."""
        found: Facts = self._answer()
        return found

    def measure(self, asked: Asked) -> list[float]:
        """The seconds of each call."""
        self._pipe.send(asked)
        found: list[float] = self._answer()
        return found

    def memory(self) -> int | None:
        """By how many bytes the process, or the GPU, has grown. The worker ends."""
        self._pipe.send(None)
        found: int | None = self._answer()
        self._process.join(_GRACE)
        return found

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            killed = code is not None and code < 0
            how = f"by {signal.Signals(-code).name}" if code is not None and killed else f"with exit code {code}"
            remedy = "give a smaller --batch, or fewer models, if there was too little memory" if killed else None
            raise DimefmError(f"its process ended {how}", remedy=remedy) from None
        if isinstance(answer, DimefmError):
            raise answer
        return answer


def prepare(subjects: Sequence[Subject]) -> None:
    """Let processes that are started from now on share the libraries that these need."""
    _PROCESSES.set_forkserver_preload(sorted({name for one in subjects for name in one.libraries}))


def _work(pipe: Any, subject: Subject, threads: int, batches: Sequence[int], seconds: float) -> None:
    """What the process does. `pipe` is a Connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    library_warnings.silence()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    before = _own_bytes()
    try:
        with loading(subject, threads) as loaded:
            held = {(tower, batch): loaded.inputs(tower, batch) for tower in loaded.calls for batch in batches}
            for (tower, batch), values in held.items():
                _timed(loaded, Asked(tower, batch, min(_WARM, seconds)), values, _WARM_CALLS)
            _forget_peak(loaded)
            gc.collect()
            gc.disable()
            pipe.send(loaded.facts)
            while (asked := pipe.recv()) is not None:
                pipe.send(_timed(loaded, asked, held[asked.tower, asked.batch], _LEAST))
            pipe.send(_grown(loaded, before))
    except EOFError:
        return  # the parent has ended
    except DimefmError as error:
        pipe.send(error)
    except Exception as error:  # whatever a library raises concerns this model alone
        reason = (str(error).strip() or "no message").splitlines()[0]
        pipe.send(DimefmError(f"{type(error).__name__}: {reason}"))


def _timed(loaded: Loaded, asked: Asked, values: object, least: int) -> list[float]:
    """Seconds of each call, until they take as long together as was asked for. They are at least `least`, unless one
    takes a second."""
    call, found = loaded.calls[asked.tower], list[float]()
    loaded.wait()
    while True:
        began = time.perf_counter()
        call(values)
        loaded.wait()
        found.append(time.perf_counter() - began)
        if sum(found) >= asked.seconds and (len(found) >= least or found[0] > _SLOW):
            return found


def _own_bytes() -> int | None:
    """Resident bytes of this process, without files that are mapped; None where the system does not say."""
    found = _status()
    return found["RssAnon"] + found["RssShmem"] if "RssAnon" in found else None


def _forget_peak(loaded: Loaded) -> None:
    """Let the peak of memory begin now."""
    if loaded.facts.device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        _RESET.write_text("5")


def _grown(loaded: Loaded, before: int | None) -> int | None:
    """By how many bytes this process has grown to its peak. Libraries that were mapped meanwhile do not count."""
    if loaded.facts.device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    found = _status()
    return None if before is None else max(0, found["VmHWM"] - found["RssFile"] - before)


def _status() -> dict[str, int]:
    """Bytes by name, from proc(5)."""
    if not _STATUS.exists():
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.M)}
