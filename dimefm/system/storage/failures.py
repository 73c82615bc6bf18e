"""What goes wrong with storage, made the same for all: OSErrors that name a file, and StoreErrors with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dimefm.errors import DimefmError, StoreError
from dimefm.system.storage.places import is_url

GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What a file that is not there raises. Any other OSError is about the storage, or the right to read it."""

_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
_NOT_THERE = (404, 410)  # of HTTP
_ELSEWHERE = "no folder can be made there: give another place"
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "mend the permissions, or give another place",
    errno.EPERM: "mend the permissions, or give another place",
    errno.EROFS: "it is read-only: mend that, or give another place",
    errno.ENOENT: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.ENAMETOOLONG: "give a shorter name",
}
_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google")


@contextmanager
def asking(path: str) -> Iterator[None]:
    """Around a request about `path`: whatever the storage's client raises becomes an OSError with a number and a path,
    of the class that belongs to the number."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in _NOT_THERE:
            raise OSError(errno.EIO, str(cause), path) from error  # fsspec reports every failure of http as not found
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        words = error.strerror or str(error)
        if words.strip("/") in path:  # fsspec's own errors are often the path alone, which is shown already
            words = os.strerror(number)
        raise OSError(number, words, path) from error
    except DimefmError:
        raise
    except Exception as error:  # of a client's own kind, such as botocore's for a connection that is refused
        raise OSError(errno.EIO, str(error), path) from error


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Around reading a local file: every OSError names the file, as that of opening it does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = path
        raise


@contextmanager
def writing_to(path: str) -> Iterator[None]:
    """Around a block that only writes: an OSError becomes a StoreError about `path`, and so does an error of an object
    store's own client, such as a refused connection."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not is_url(path) or not (package in _CLIENTS or isinstance(error, NotImplementedError)):
            raise
        raise cannot_write(path, OSError(str(error) or "it is read-only")) from error


def cannot_write(path: str, error: OSError) -> StoreError:
    """The error for a full disk, a read-only folder or a lost share."""
    remedy = f"{remedy_for(error)}, and run the same command again; what was finished is kept"
    return StoreError(f"{path} cannot be written: {error.strerror or error}", remedy=remedy)


def remedy_for(error: OSError) -> str:
    """What to do about an error of storage, before the same command is run again."""
    return _REMEDIES.get(error.errno or 0, "check the path, its permissions and that the storage answers")
