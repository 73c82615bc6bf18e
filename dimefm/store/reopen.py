"""A store that a command has opened, opened again by its workers, which may be on other machines."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cache_schemas import SchemaError
from dimefm.errors import DimefmError, StoreError, UnreadableError
from dimefm.store.embedding_store import Store
from dimefm.system import storage


def reopen(path: str, *others: str, additions: int | None = None) -> Store:
    """The store at `path`; `additions` as in Store. Raises UnreadableError where it, or one of the folders `others`, is
    not there, as on a machine without the mount: the command has seen them, so other machines can."""
    with reopening():
        for other in others:
            if not storage.exists(other):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), other)
        return Store(path, additions=additions)


@contextmanager
def reopening() -> Iterator[None]:
    """Around opening again what the command has opened: what is not there is an UnreadableError."""
    try:
        yield
    except (OSError, SchemaError, StoreError) as error:
        what = error.what if isinstance(error, DimefmError) else str(error)
        raise UnreadableError(what, remedy="let every machine of the cluster see the same files") from error
