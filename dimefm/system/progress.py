"""Progress of long work, in one line: renewed in place on a terminal, a new one every ten seconds in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import ClassVar, Self

from dimefm.system import inert_text, notes
from dimefm.system.wording import counted, rate

_LINE_EVERY = {True: 0.2, False: 10.0}
"""Seconds between two lines: on a terminal, and in a log."""
_WINDOW, _POINT_EVERY = 60.0, 1.0  # seconds of work by which the rate goes, and between two counts in them
_WIDTH = 80  # where a terminal does not say its own


class Progress:
    """`with Progress("encoding", total, "image") as p: p.at(n)`. `done` is the number at which a resumed job starts.

    The rate, and the time that is left by it, are those of the last minute. What came before the first rows were done,
    such as the start of workers, does not count. Threads may share it, and one may work within another.
    """

    _in_line: ClassVar[int] = 0  # characters of the line on the terminal that is renewed in place

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit, self._now = what, total, unit, done
        self._started = self._printed = time.monotonic()
        self._steady: deque[tuple[float, int]] = deque()  # when how many were done, in the last minute
        self._first: tuple[float, int] | None = None  # the first of these that there was
        self._in_place, self._turn = sys.stderr.isatty(), threading.Lock()
        if self._in_place:
            self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            if kind is None:
                self._show(ended=True)
            elif self._in_place:
                self._print("\n")
                Progress._in_line = 0

    def at(self, done: int) -> None:
        """Show that `done` of the total are done."""
        with self._turn:
            now = time.monotonic()
            if done != self._now and (not self._steady or now - self._steady[-1][0] >= _POINT_EVERY):
                self._steady.append((now, done))
                self._first = self._first or (now, done)
                while len(self._steady) > 2 and now - self._steady[1][0] > _WINDOW:
                    self._steady.popleft()
            self._now = done
            if now - self._printed > _LINE_EVERY[self._in_place]:
                self._show()

    def note(self, text: str) -> None:
        """Print a line that stays, above the progress."""
        with self._turn:
            self._put(f"{self._what}: {self._now:,} of {self._total:,}: {text}", stays=True)
            if self._in_place:
                self._show()

    def _show(self, *, ended: bool = False) -> None:
        self._printed = now = time.monotonic()
        percent = 100 * self._now // max(1, self._total)
        parts = [f"{self._what}: {self._now:,} of {counted(self._total, self._unit)} ({percent}%)"]
        since, before = (self._first if ended else self._steady[0] if self._steady else None) or (now, self._now)
        left = "time left: measuring"
        if self._now > before:
            parts.append(rate(self._now - before, now - since, self._unit))
            left = f"{duration(max(0, self._total - self._now) * (now - since) / (self._now - before))} left"
        parts.append(f"took {duration(now - self._started)}" if ended else left)
        self._put(", ".join(parts), stays=ended)

    def _put(self, text: str, *, stays: bool) -> None:
        """Print a line. On a terminal it takes the place of the one that is there, unless that stays."""
        line = inert_text.text(text)
        if not self._in_place:
            self._print(f"{line}\n")
            return
        if not stays:
            line = line[: _columns() - 1]
        end = "\n" if stays else ""
        self._print(f"\r{line.ljust(Progress._in_line)}{end}")
        Progress._in_line = 0 if stays else len(line)

    def _print(self, text: str) -> None:
        if not notes.are_muted():
            print(text, end="", file=sys.stderr, flush=True)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH
    except OSError:
        return _WIDTH


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
