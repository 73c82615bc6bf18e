"""One writer at a time: a lock on a local store, held for as long as the process lives."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from dimefm import storage
from dimefm.errors import StoreError

_LOCK = ".lock"
_held: set[TextIO] = set()
_forks_let_go = False
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what some network file systems answer


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Hold the store for the block. Raises StoreError with the owner's name where another process writes to it.

    The kernel lets go of the lock when the process ends, however it ends. A block that leaves nothing but the lock
    leaves no folder either. Stores at URLs, and file systems that cannot lock, have no such lock: there two runs on one
    store are only harmless in that both write the same bytes.
    """
    path = storage.absolute(store)
    if storage.is_url(path):
        yield
        return
    folder = Path(path)
    made = not folder.exists()
    with _locked(folder) as file:
        _keep_from_forks(file)
        try:
            _sign(file, folder)
            yield
        finally:
            _held.discard(file)
            with suppress(OSError):  # another process may have come at this moment
                if made and [entry.name for entry in folder.iterdir()] == [_LOCK]:
                    (folder / _LOCK).unlink()
                    folder.rmdir()


def _locked(folder: Path) -> TextIO:
    """The lock file of a folder, made if need be, and locked until it is closed."""
    while True:
        try:
            storage.make_folder(str(folder))
        except FileExistsError:
            raise StoreError(f"{folder} exists and is a file", remedy="give another --out") from None
        except OSError as error:
            raise storage.cannot_write(str(folder), error) from error
        with suppress(FileNotFoundError):  # another process has just removed a folder that it left empty
            file = _open(folder)
            if os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat()):
                return file
            file.close()


def _open(folder: Path) -> TextIO:
    try:
        file = (folder / _LOCK).open("a+", encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage.cannot_write(str(folder), error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            what = f"{folder} is being written by {_show(file.read())}"
        raise StoreError(what, remedy="wait until it has finished, or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise storage.cannot_write(str(folder), error) from error
    return file


def _keep_from_forks(file: TextIO) -> None:
    """A forked child shares its parent's lock, and would hold it for a while after the parent was killed."""
    global _forks_let_go
    if not _forks_let_go:
        os.register_at_fork(after_in_child=lambda: [held.close() for held in _held])
        _forks_let_go = True
    _held.add(file)


def _sign(file: TextIO, folder: Path) -> None:
    try:
        file.truncate(0)
        os.write(file.fileno(), _owner().encode())  # past the buffer, which would be written once more by close
    except OSError as error:
        raise storage.cannot_write(str(folder), error) from error


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


def _show(owner: str) -> str:
    try:
        facts = json.loads(owner)
        place = f"process {facts['process']} of {facts['user']} on {facts['host']}"
        return f"{place} since {facts['since']}: {facts['command']}"
    except (ValueError, KeyError, TypeError):  # it is just writing who it is
        return "another process"
