"""Every Python that has this folder on its PYTHONPATH loads this, Ray's workers too: it waits where a test wants it.

Where it waits is a pattern, the target of the link `closed` in the folder DIMEFM_TEST_GATE: of "EVENT PATH", with the
event open, os.rename (the path is the new name) or os.remove. Whoever comes there says so by a file named by its id,
and stays, before it does it, until the link is gone. See tests.processes.Gate.
"""

import os
import sys
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


_GATE = os.environ.get("DIMEFM_TEST_GATE")
if _GATE:
    sys.addaudithook(_stay)
