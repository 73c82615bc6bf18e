"""Paths that a document names: a store, an index, a plan, which somebody else may have written.

What the user types is opened as it is, whatever fsspec makes of it. What a document names is opened only if it is a
local file or folder, or lies in an object store: a request there goes to where the user's own settings lead, while
http://HOST, sftp://HOST and the like let the document choose the host, and a chained URL (A::B) can unpack, keep or
run what it finds. `DIMEFM_ALLOW_SCHEMES=https,sftp` is the user's word for more schemes; no word opens a chained URL.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dimefm.errors import SourceError, StoreError
from dimefm.system import storage

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"})
"""Schemes that are always opened: they name a bucket, never a host."""

VARIABLE = "DIMEFM_ALLOW_SCHEMES"


def named(path: str, where: str) -> str:
    """`path`, which the document `where` names, if it may be opened. Raises StoreError where it may not; a file that is
    not there may."""
    reason = remedy = ""
    if storage.is_url(path):
        scheme = path.partition("://")[0]
        if "::" in path:
            reason, remedy = "chained URLs are not opened", "copy what it leads to, and name the copy"
        elif scheme not in OBJECT_STORES | set(allowed().split(",")):
            reason = f"{scheme}:// is not opened at the word of a document"
            remedy = f"if you trust it, set {VARIABLE}={scheme}"
    elif not _is_ordinary(path):
        reason, remedy = "it is neither a file nor a folder", "do not use what names it unless you know why"
    if reason:
        raise StoreError(f"{where} names {path}: {reason}", remedy=remedy)
    return path


def allowed() -> str:
    """The further schemes that the user allows, with commas between."""
    return os.environ.get(VARIABLE, "")


def allow(schemes: str) -> None:
    """Allow these schemes too, in this process and in those that it starts."""
    found = set(f"{allowed()},{schemes}".split(",")) - OBJECT_STORES - {""}
    if found:
        os.environ[VARIABLE] = ",".join(sorted(found))


@contextmanager
def allowing(sources: Sequence[str]) -> Iterator[None]:
    """For the block, the schemes of these sources are allowed: the user has typed them, and the plan that is made of
    them names the same. Raises SourceError for a chained one, which no later command would open."""
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
    """Whether opening a local path can do no more than read: a pipe waits for ever, a device never ends."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # once an image
    except (OSError, ValueError):
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
