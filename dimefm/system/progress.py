"""Progress of long work: a bar on a terminal, a plain line every ten seconds in a log; with the rate and time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from dimefm.system import inert_text, notes

_LINE_EVERY = 10.0  # seconds


class Progress:
    """`with Progress("images", total, "image") as p: p.at(n)`. `done` is the number at which a resumed job starts."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._first = self._now = done
        self._started = self._printed = time.monotonic()
        shown = sys.stderr.isatty() and not notes.are_muted()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit) if shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def at(self, done: int) -> None:
        """Show that `done` of the total are done."""
        if self._bar is not None:
            self._bar.update(done - self._now)
        self._now = done
        if self._bar is None and time.monotonic() - self._printed > _LINE_EVERY:
            self._line()

    def note(self, text: str) -> None:
        """Print a line that stays, above the progress."""
        line = inert_text.text(f"{self._what}: {self._now:,} of {self._total:,}: {text}")
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            notes.note(line)

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        rate = (self._now - self._first) / max(seconds, 1e-9)
        left = f", {duration((self._total - self._now) / rate)} left" if 0 < self._now < self._total and rate else ""
        percent = 100 * self._now / max(1, self._total)
        text = f"{self._what}: {self._now:,} of {self._total:,} {self._unit}s ({percent:.0f}%), "
        notes.note(f"{text}{rate:,.1f} {self._unit}/s{left}")


def duration(seconds: float) -> str:
    """Seconds for people: `75` as `1m15s`, `7300` as `2h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def amount(count: float) -> str:
    """Bytes for people: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
