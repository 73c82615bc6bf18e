"""How Ctrl-C and SIGTERM end a command: with everything released, one message, and the exit code that a shell expects.

Within a block that holds something, such as a lock, the first signal raises KeyboardInterrupt in the main thread, as
Ctrl-C does; elsewhere there is nothing to release, and it ends the process at once. A second signal ends it at once in
any case, and so does the first where the main thread does not take it within seconds, because it is within a long call
of a library. That does no harm: whatever is written may be killed at any moment.

Only a program calls `listen`. A process that uses dimefm as a library keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

GOES_ON = "the same command goes on"
BEGINS_AGAIN = "nothing was finished; the same command begins again"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = b"\0"  # what the main thread writes to the watcher
_PATIENCE = 5.0  # seconds within which the main thread must take a signal


class _State:
    """What this process knows of signals. A plain class: until `listen` is called, Ctrl-C shows a traceback."""

    def __init__(self) -> None:
        self.listens = False
        self.to_watcher = -1  # a pipe, to which Python writes the number of each signal as it arrives
        self.output: Callable[[], str | None] = lambda: None  # says where the command writes
        self.out: str | None = None  # what it said when the signal came
        self.holding = 0  # blocks of the main thread that hold something
        self.asks = 0.0  # for so many signals: see `ask_for`
        self.taken = 0  # signals that the main thread has taken
        self.number: signal.Signals | None = None  # the signal by which it ends
        self.again = False  # that signal is sent once more
        self.shown = False  # the message


_state = _State()


def listen(output: Callable[[], str | None] = lambda: None) -> None:
    """Handle both signals from now on, in this process and not in those that it forks. A signal that is ignored, as
    under nohup, stays so. `output` gives the path that is being written, for the message; it may come with a second
    call."""
    _state.output = output
    if _state.listens or threading.current_thread() is not threading.main_thread():
        return
    _state.listens = True
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it takes SIGTERM too, and is read on import
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _take)
    reading, _state.to_watcher = os.pipe()
    os.set_blocking(_state.to_watcher, False)
    _watched(True)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    sys.unraisablehook = _send_again_if_lost
    # Not while it forks: until it has let go, the new process would write of its own signals too.
    before, after = partial(_watched, False), partial(_watched, True)
    os.register_at_fork(before=before, after_in_parent=after, after_in_child=_leave_to_parent)


@contextmanager
def holding(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """A block that a signal leaves as an error does, because it has something to release. The message then says `kept`:
    what is there, and how to go on. Of blocks within each other the inner one says it."""
    counts = threading.current_thread() is threading.main_thread()
    _state.holding += counts
    try:
        yield
    except BaseException as error:
        if kept and signal_of(error) and not hasattr(error, "__notes__"):
            with suppress(Exception):  # such as a storage that does not answer
                error.add_note(kept())
        raise
    finally:
        _state.holding -= counts


def kept_in(out: str) -> str:
    """What is in an output after a stop, as far as can be seen at a glance."""
    names = os.listdir(out) if os.path.isdir(out) else []  # noqa: PTH112, PTH208
    if "://" in out or os.path.isfile(out) or any(not name.startswith(".") for name in names):  # noqa: PTH113
        return f"what was finished is kept in {out}; {GOES_ON}"
    return BEGINS_AGAIN


def ask_for(signals: float) -> None:
    """How many signals, from the first on, have another handler for now, which may take its time, and calls `took`."""
    _state.asks = signals


def took() -> None:
    """A handler has taken a signal."""
    _state.taken += 1


def signal_of(error: BaseException) -> signal.Signals | None:
    """The signal that an error comes from. After a signal that is any error: a library may have made its own of it."""
    return _state.number or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)


def speaks() -> bool:
    """Whether this process says how its job ended: of those that torchrun starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


def message(error: BaseException, number: signal.Signals) -> str:
    """What is shown of an error that comes from a signal."""
    _state.shown = True
    return _message(number, next(iter(getattr(error, "__notes__", [])), None))


def leave_no_trace() -> None:
    """Let the exit code of a stopped command be its own. `python -m` remembers a KeyboardInterrupt that leaves code
    made from a string, such as a dataclass's, even if it was caught further up, and then ends by SIGINT, whatever the
    signal was. It forgets it when other code from a string runs."""
    exec("")


def _message(number: signal.Signals, kept: str | None = None) -> str:
    kept = kept or (kept_in(_state.out) if _state.out else None)
    below = "\n" if os.isatty(2) else ""  # a terminal shows ^C where the last line ends
    what = f"{below}Stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}"
    return f"{what}: {kept}" if kept else what


def _take(number: int, frame: FrameType | None) -> None:
    took()
    if _state.number and not _state.again:
        _end(number)
    _state.out = _state.output()
    if not _state.holding:
        _end(number)
    _state.number, _state.again = _state.number or signal.Signals(number), False
    if frame and frame.f_globals.get("__name__") == "logging":
        _send_again()  # an error here would leave the lock of all logging taken
        return
    raise KeyboardInterrupt


def _send_again() -> None:
    _state.again = True
    os.write(_state.to_watcher, _AGAIN)


def _send_again_if_lost(lost: Any) -> None:
    """The hook for errors that nobody can catch, such as one within __del__."""
    if isinstance(lost.exc_value, KeyboardInterrupt) and _state.number:
        _send_again()
    else:
        sys.__unraisablehook__(lost)


def _watched(watched: bool) -> None:
    """Whether Python writes to the watcher which signals arrive."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(_state.to_watcher if watched else -1, warn_on_full_buffer=False)


def _watch(reading: int) -> None:
    """Learn of each signal as it arrives, also while the main thread is within a call of a library."""
    arrived = 0
    while numbers := os.read(reading, 1):
        if numbers == _AGAIN:
            time.sleep(0.02)
            os.kill(os.getpid(), _state.number or signal.SIGINT)
        elif numbers[0] in _SIGNALS:
            arrived += 1
            end = time.monotonic() + _PATIENCE
            while _state.taken < arrived and arrived > _state.asks:
                if time.monotonic() > end:
                    _end(numbers[0])
                time.sleep(0.02)


def _end(number: int) -> NoReturn:
    """End this process as it is, from any thread."""
    first = _state.number or signal.Signals(number)
    if not _state.shown and speaks():
        with suppress(OSError):  # nobody reads it any more
            os.write(2, f"{_message(first)}\n".encode())
    os._exit(128 + first)


def _leave_to_parent() -> None:
    """In a forked process: a signal ends it, as if this module were not there."""
    global _state
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is _take:
            signal.signal(number, signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__
    _state = _State()
