"""Paths that are named in a document, such as a store, an index or a plan, which someone else may have written.

A path that the user types is opened as fsspec understands it. A path that a document names is opened only if it is a
local file or folder, or lies in an object store: requests to these go where the user's own settings lead. URLs such as
http://HOST or sftp://HOST would let the document choose the host, and a chained URL (A::B) can unpack, keep or run what
it finds. With `DIMEFM_ALLOW_SCHEMES=https,sftp` the user allows more schemes; nothing allows a chained URL.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dimefm.errors import SourceError, StoreError
from dimefm.system import storage

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"})
"""Schemes that are always allowed: they name a bucket, never a host."""

VARIABLE = "DIMEFM_ALLOW_SCHEMES"


def named(path: str, where: str) -> str:
    """Return `path`, which the document `where` names, if it may be opened; a missing file may. Raises StoreError where
    it may not."""
    reason = remedy = ""
    if storage.is_url(path):
        scheme = path.partition("://")[0]
        if "::" in path:
            reason, remedy = "chained URLs are not opened", "copy what it leads to, and name the copy"
        elif scheme not in OBJECT_STORES | set(allowed().split(",")):
            reason = f"{scheme}:// is not opened because a document names it"
            remedy = f"if you trust it, set {VARIABLE}={scheme}"
    elif not _is_ordinary(path):
        reason, remedy = "it is neither a file nor a folder", "do not use what names it unless you know why"
    if reason:
        raise StoreError(f"{where} names {path}: {reason}", remedy=remedy)
    return path


def allowed() -> str:
    """The further schemes that the user allows, separated by commas."""
    return os.environ.get(VARIABLE, "")


def allow(schemes: str) -> None:
    """Allow these schemes as well, in this process and in those that it starts."""
    found = set(f"{allowed()},{schemes}".split(",")) - OBJECT_STORES - {""}
    if found:
        os.environ[VARIABLE] = ",".join(sorted(found))


@contextmanager
def allowing(sources: Sequence[str]) -> Iterator[None]:
    """Within the block, allow the schemes of these sources: the user has typed them, and the plan that is made of them
    names the same places. Raises SourceError for a chained URL, which no later command would open."""
    before = os.environ.get(VARIABLE)
    urls = [source for source in sources if storage.is_url(source)]
    for url in urls:
        if "::" in url:
            what = f"{url} is chained, and a plan that names it would not be opened"
            raise SourceError(what, remedy="copy what it leads to, and name the copy")
    allow(",".join(url.partition("://")[0] for url in urls))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _is_ordinary(path: str) -> bool:
    """Whether a local path is a file or folder, or nothing: reading a pipe could wait, and a device go on, for ever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # called for every image
    except (OSError, ValueError):
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
