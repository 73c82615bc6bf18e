"""What a step of the kit is given: where it runs, its inputs, the time it has, and where its measurements go.

A measurement is sent to the process that keeps the results at once, so that a step that is stopped keeps what it had.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.results import Line
from benchmarks.gpu.sizes import Sizes

Send = Callable[[tuple[str, object]], None]


class Kit:
    """One step's view of the kit. `known` are numbers that earlier steps measured, by name."""

    def __init__(self, device: str, sizes: Sizes, inputs: Inputs, known: dict[str, float], until: float, send: Send):
        self.device, self.sizes, self.inputs = torch.device(device), sizes, inputs
        self.known, self._until, self._send = known, until, send
        self.gpu_bytes = 0  # the peak of processes that the step has forked

    def line(self, what: str, value: float | str, unit: str = "", at: str = "") -> None:
        """A measurement that nothing is asked of."""
        self._add(Line(what, value, unit, at))

    def bar(
        self, what: str, value: float, unit: str = "", at: str = "", *,
        least: float | None = None, most: float | None = None,
    ) -> None:  # fmt: skip
        """A speed that should be reached. Missing it does not make the kit fail."""
        self._add(Line(what, value, unit, at, _limit(least, most), "met" if _within(value, least, most) else "MISSED"))

    def check(
        self, what: str, value: float, unit: str = "", at: str = "", *,
        least: float | None = None, most: float | None = None,
    ) -> None:  # fmt: skip
        """A number that is wrong outside its limits, which makes the kit fail. A NaN is outside of any."""
        self._add(Line(what, value, unit, at, _limit(least, most), "right" if _within(value, least, most) else "WRONG"))

    def require(self, what: str, true: bool, at: str = "") -> None:
        """A check of something that is so or not."""
        self._add(Line(what, "yes" if true else "no", "", at, "yes", "right" if true else "WRONG"))

    def rate(self, name: str, value: float) -> None:
        """A rate for rates.json."""
        self._send(("rate", (name, value)))

    def remember(self, name: str, value: float) -> None:
        """A number that later steps may want."""
        self.known[name] = value
        self._send(("known", (name, value)))

    def each(self, *parts: Callable[[Kit], None]) -> None:
        """Parts of a step that stand alone: where one fails, its traceback is kept and the next one begins."""
        for part in parts:
            began = time.monotonic()
            try:
                part(self)
            except Exception:
                traceback.print_exc()
                self._send(("failed", traceback.format_exc()))
            print(f"{part.__name__}: {time.monotonic() - began:.1f} s", flush=True)

    def left(self) -> float:
        """Seconds until this step is stopped."""
        return self._until - time.monotonic()

    def enough(self, seconds: float, what: str) -> bool:
        """Whether there is time for `what`, which takes about so many seconds on a GPU; a line says so where there is
        not."""
        return self._enough(seconds * self.sizes.pace, what)

    def enough_to_compile(self) -> bool:
        """Whether there is time for torch.compile."""
        return self._enough(self.sizes.compile_seconds, "--compile")

    def _enough(self, seconds: float, what: str) -> bool:
        if self.left() >= seconds:
            return True
        self.line(f"left out: {what}", f"{seconds:.0f} s wanted, {max(0, self.left()):.0f} s left")
        return False

    def _add(self, line: Line) -> None:
        if isinstance(line.value, float) and not math.isfinite(line.value):
            line = replace(line, value=str(line.value))  # JSON has no number for it
        self._send(("line", asdict(line)))


def _within(value: float, least: float | None, most: float | None) -> bool:
    return math.isfinite(value) and (least is None or value >= least) and (most is None or value <= most)


def _limit(least: float | None, most: float | None) -> str:
    return f"at least {least:g}" if least is not None else f"at most {most:g}"
