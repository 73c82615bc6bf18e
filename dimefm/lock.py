"""One writer at a time: a lock on a local store, held for as long as the process lives."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dimefm import storage
from dimefm.errors import StoreError

_LOCK = ".lock"


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Hold the store for the block. Raises StoreError with the owner's name where another process writes to it.

    The kernel lets go of the lock when the process ends, however it ends. Stores at URLs have no such lock: there two
    runs on one store are only harmless in that both write the same bytes.
    """
    path = storage.absolute(store)
    if storage.is_url(path):
        yield
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        file = (Path(path) / _LOCK).open("a+", encoding="utf-8")
    except FileExistsError:
        raise StoreError(f"{path} exists and is a file", remedy="give another --out") from None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}", remedy="mend its permissions, or give another place"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            what = f"{path} is being written by {file.read().strip() or 'another process'}"
            raise StoreError(what, remedy="wait until it has finished, or stop it") from None
        file.truncate(0)
        file.write(_owner())
        file.flush()
        yield


def _owner() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    facts = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "user": user,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    return json.dumps(facts)
