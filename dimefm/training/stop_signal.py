"""SIGINT and SIGTERM as a request to stop, which the trainer grants at the end of the step."""

from __future__ import annotations

import math
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from dimefm.system import stopping


class StopSignal:
    """Within ``with StopSignal() as stop:``, `stop.received` is the first signal that has arrived, None before.

    A second signal has its usual effect at once, but not in a process that torchrun started: torchrun sends it one,
    Slurm another, and who wants an end at once kills. Outside the main thread nothing is caught: Python has no
    handlers there.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._awaited = math.inf if "TORCHELASTIC_RUN_ID" in os.environ else 1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
            stopping.ask_for(self._awaited)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._awaited == 1:  # else two that came as one could not be told from one that is not taken
            stopping.ask_for(0)
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        stopping.took()
        self.received = self.received or signal.Signals(number)
        if self._awaited == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()
