"""Every Python that has this folder on its PYTHONPATH loads this, Ray's workers too: it waits where a test wants it.

Where it waits is a pattern, the target of the link `closed` in the folder DIMEFM_TEST_GATE: of "EVENT PATH", with the
event open, os.rename (the path is the new name) or os.remove. Whoever comes there says so by a file named by its id,
and stays, before it does it, until the link is gone. See tests.processes.Gate.

And it dies of SIGSEGV where it opens a file whose path fits the pattern DIMEFM_TEST_CRASH: a decoder that crashes of an
image. Where the pattern begins with "memory ", it asks for 64 GiB instead.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from fnmatch import fnmatchcase

_PLACES = {"open": 0, "os.rename": 1, "os.remove": 0}


def _stay(event: str, arguments: tuple[object, ...]) -> None:
    if event not in _PLACES or isinstance(arguments[_PLACES[event]], int):
        return
    place, said = f"{event} {os.fsdecode(arguments[_PLACES[event]])}", False  # type: ignore[arg-type]
    with suppress(FileNotFoundError):
        while fnmatchcase(place, os.readlink(f"{_GATE}/closed")):  # noqa: PTH115
            if not said:
                open(f"{_GATE}/{os.getpid()}", "w").close()  # noqa: PTH123
                said = True
            time.sleep(0.01)


def _crash(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or isinstance(arguments[0], int):
        return
    kind, _, pattern = _CRASH.rpartition(" ")
    if fnmatchcase(os.fsdecode(arguments[0]), pattern):  # type: ignore[arg-type]
        if kind == "memory":
            bytes(1 << 36)  # promised, but not touched, where there is no limit
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # at this moment, as a decoder would


_CRASH = os.environ.get("DIMEFM_TEST_CRASH", "")
if _CRASH:
    sys.addaudithook(_crash)
_GATE = os.environ.get("DIMEFM_TEST_GATE")
if _GATE:
    sys.addaudithook(_stay)
