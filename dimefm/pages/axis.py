"""Axes of a chart: which numbers to name, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, drawn from the pixel `start` to the pixel `end`. `ticks` are the values that are named."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond the axis lies at its end."""
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    @property
    def scale(self) -> str:
        """For the page's script, which finds values from pixels."""
        return f"{self.low:.9g} {self.high:.9g} {self.start:.2f} {self.end:.2f} {int(self.log)}"


def axis(values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that has room for all finite `values`, from round number to round number; with `zero` from 0 on. A
    logarithmic one is linear where a value is not positive."""
    found = [value for value in values if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if log and low > 0:
        return _decades(low, high, start, end)
    low = min(low, 0.0) if zero else low
    if low == high:
        room = abs(low) / 2 or 0.5
        low, high = (low - room, high + room) if not zero else (low, low + 1)
    step = _round_step((high - low) / _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, start, end, tuple(round(n * step, 12) for n in range(first, last + 1)))


def _decades(low: float, high: float, start: float, end: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    ticks = [lead * 10.0**power for power in range(first, last + 1) for lead in every]
    inside = tuple(tick for tick in ticks if 10.0**first <= tick <= 10.0**last)
    return Axis(10.0**first, 10.0**last, start, end, inside, log=True)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= least * (1 - 1e-9))


def words(value: float) -> str:
    """A number as an axis names it: 20k, 1.5M, 0.05, 5e-4."""
    if 0 < abs(value) < 1e-3:
        lead, power = f"{value:.3e}".split("e")
        return f"{float(lead):g}e{int(power)}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"
