"""SIGINT and SIGTERM as a request to stop, which the trainer grants at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from dimefm.system import stopping


class StopSignal:
    """Within ``with StopSignal() as stop:``, `stop.received` is the first signal that has arrived, None before.

    A second signal has its usual effect at once. Outside the main thread nothing is caught: Python has no handlers
    there.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
            stopping.ask_for_the_first(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopping.ask_for_the_first(False)
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        stopping.took()
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()
