"""One writer at a time: a lock on a local store, held for as long as the process lives, or a lease at a URL."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dimefm.errors import StoreError
from dimefm.system import storage
from dimefm.system.lease import leasing
from dimefm.system.lock_owner import show_owner, this_process
from dimefm.system.stopping import holding, kept_in

_LOCK = ".lock"
_held: set[BinaryIO] = set()
_forks_let_go = False
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What some network file systems answer who asks for a lock."""


@contextmanager
def writing(store: str, of_use: Callable[[set[str]], object] = bool) -> Iterator[str | None]:
    """Hold the store for the block. Raises StoreError with the owner's name where another process writes to it.

    The kernel releases the lock when the process ends, however it ends. If nothing was there before and an error ends
    the block, all is removed again unless it is `of_use` to go on: this gets the files, as paths within the folder. On
    local file systems without locks, two runs on one store do no harm only because both write the same bytes. At a URL
    it is a lease (see system.lease), whose token the block gets.
    """
    path = storage.absolute(store)
    if storage.is_url(path):
        with holding(lambda: kept_in(store)), leasing(path) as token:
            yield token
        return
    folder = Path(path)
    made = storage.missing(path)
    with holding(lambda: kept_in(store)), _locked(folder) as file:
        new = {path.name for path in folder.iterdir()} == {_LOCK}
        _keep_from_forks(file)
        try:
            _sign(file, folder)
            yield None
        except BaseException:
            if new:
                with suppress(Exception):  # the error of the block is the one to report
                    if not of_use(storage.tree(path)):
                        _empty(folder)
            raise
        finally:
            _held.discard(file)
            with suppress(OSError):
                file.truncate(0)
                (folder / _LOCK).unlink()
            storage.remove_empty(made)


def _empty(folder: Path) -> None:
    """Remove all but the lock from a folder that holds nothing of use."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _locked(folder: Path) -> BinaryIO:
    """The lock file of a folder, which is made if necessary; locked until it is closed."""
    while True:
        try:
            storage.make_folder(str(folder))
        except FileExistsError:
            raise StoreError(f"{folder} exists and is a file", remedy="give another --out") from None
        except OSError as error:
            raise storage.cannot_write(str(folder), error) from error
        with suppress(FileNotFoundError):  # another process has just removed its lock, or the folder that it had made
            file = _open(folder)
            if os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat()):
                return file
            file.close()


def _open(folder: Path) -> BinaryIO:
    try:
        # Never through a link: it could lead anywhere, and the lock file is overwritten.
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_ours(folder) from None
        raise storage.cannot_write(str(folder), error) from error
    file = os.fdopen(descriptor, "r+b", buffering=0)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise _not_ours(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            what = f"{folder} is being written by {show_owner(file.read())}"
        raise StoreError(what, remedy="wait until it has finished, or stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise storage.cannot_write(str(folder), error) from error
    return file


def _not_ours(folder: Path) -> StoreError:
    return StoreError(f"{folder / _LOCK} is a link, or no plain file", remedy="it is not dimefm's: delete it")


def _keep_from_forks(file: BinaryIO) -> None:
    """Make forked children close the lock file: they share the parent's lock, and would still hold it after the parent
    was killed."""
    global _forks_let_go
    if not _forks_let_go:
        os.register_at_fork(after_in_child=lambda: [held.close() for held in _held])
        _forks_let_go = True
    _held.add(file)


def _sign(file: BinaryIO, folder: Path) -> None:
    try:
        file.truncate(0)
        file.write(this_process())
    except OSError as error:
        raise storage.cannot_write(str(folder), error) from error
