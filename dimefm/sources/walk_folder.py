"""The files in a folder, local or at a URL, and a count of everything else in it.

Links to folders are followed, but not back to a folder that they are in. Hidden files and folders, and those that
operating systems keep for themselves, are counted and not used: they hold thumbnails, checkpoints of notebooks,
resource forks and deleted files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.system import storage
from dimefm.system.inert_text import line

CHAINED_NAMES = "names with :: in them, by which URLs are chained (rename them)"
_HIDDEN_FILES, _HIDDEN_FOLDERS = "hidden files", "hidden folders"
_SYSTEM_FOLDERS = "folders of thumbnails, of deleted files or of unfinished output (name one to use what is in it)"
_SYSTEM = frozenset({
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN"),
    *("System Volume Information", "__MACOSX", "_temporary"),
})  # fmt: skip
NOT_UTF8_NAMES = "names that are not UTF-8 (rename them)"
_LOST_AND_FOUND = "folders called lost+found, which are the file system's"
_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "modified")  # as s3fs, adlfs, gcsfs, ... call it
_Identity = tuple[int, int]
"""What tells a folder from all others, however it was reached: its device and its number on it."""


def files_below(folder: str, account: Account) -> list[SourceFile]:
    """The files in a folder and in all folders below it, sorted by path; none where the folder does not exist. What is
    passed over goes into `account`.

    Raises SourceError for what cannot be read, and for links into folders that do not exist: their files would be left
    out of the plan for good.
    """
    if storage.is_url(folder):
        return _files_at_url(folder, account, storage.walk)
    return sorted(_walk(folder, account, deep=True))


def files_in(folder: str, keep: Callable[[str], bool], account: Account) -> list[SourceFile]:
    """As `files_below`, but only files in the folder itself, and of these the ones whose name `keep` accepts."""
    if storage.is_url(folder):
        found = _files_at_url(folder, account, lambda fs, inner: fs.ls(inner, detail=True))
    else:
        found = sorted(_walk(folder, account, deep=False))
    return [file for file in found if keep(file.path.rpartition("/")[2])]


def _walk(root: str, account: Account, *, deep: bool) -> Iterator[SourceFile]:
    """The files in a local folder, and with `deep` in those below it, in no order."""
    waiting, lost_links = [(root, _identities(root))], list[str]()
    while waiting:
        folder, above = waiting.pop()
        for entry in _list_folder(folder, account, is_root=folder == root):
            path = f"{folder.rstrip('/')}/{entry.name}"
            if not is_utf8(entry.name):
                account.skip(NOT_UTF8_NAMES, escape_bytes(path))
                continue
            if is_private(entry.name) and (reason := why_passed_over(entry.name, folder=is_folder(entry))):
                account.skip(reason, path)
                continue
            status = stat_listed(path, account, lost_links)
            if status is None:
                continue
            if stat.S_ISREG(status.st_mode):
                yield local_file(path, status)
            elif not stat.S_ISDIR(status.st_mode):
                account.skip("pipes, sockets and devices", path)
            elif deep and _identity(status) in above:
                account.skip("links back to a folder that they are in", path)
            elif deep:
                waiting.append((path, above | {_identity(status)}))
    require_link_targets(lost_links)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _identities(folder: str) -> frozenset[_Identity]:
    """A folder and all that it is in."""
    real, found = Path(os.path.realpath(folder)), set[_Identity]()
    for one in (real, *real.parents):
        with suppress(OSError):  # listing the folder will raise it
            found.add(_identity(one.stat()))
    return frozenset(found)


def _list_folder(folder: str, account: Account, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError as error:
        if is_root:
            return []
        raise cannot_read(folder, error) from error
    except OSError as error:
        if _is_lost_and_found(folder, error):
            account.skip(_LOST_AND_FOUND, folder)
            return []
        raise cannot_read(folder, error) from error


def stat_listed(path: str, account: Account, lost_links: list[str]) -> os.stat_result | None:
    """The status of a local path that a listing named; None where it is passed over. A link into a folder that does not
    exist is put into `lost_links`."""
    try:
        return os.stat(path)  # noqa: PTH116
    except FileNotFoundError as error:
        if not os.path.islink(path):  # noqa: PTH114
            raise cannot_read(path, error) from error
        if os.path.exists(os.path.dirname(os.path.realpath(path))):  # noqa: PTH110, PTH120
            account.skip("links to files that do not exist", path)
        else:
            lost_links.append(path)
    except OSError as error:
        if os.path.islink(path) and error.errno == errno.ELOOP:  # noqa: PTH114
            account.skip("links to themselves", path)
        elif _is_lost_and_found(path, error):
            account.skip(_LOST_AND_FOUND, path)
        else:
            raise cannot_read(path, error) from error
    return None


def require_link_targets(lost_links: list[str]) -> None:
    """Raises SourceError for links into folders that do not exist: a disk that is not mounted looks like that."""
    if lost_links:
        where = f"{line(lost_links[0])} -> {line(os.path.realpath(lost_links[0]))}"
        what = f"{len(lost_links):,} links lead into folders that do not exist, such as {where}"
        if len(lost_links) == 1:
            what = f"a link leads into a folder that does not exist: {where}"
        raise SourceError(what, remedy="mount what they lead to, or delete them; then run the same command again")


def _is_lost_and_found(path: str, error: OSError) -> bool:
    return isinstance(error, PermissionError) and path.endswith("/lost+found")


def is_private(name: str) -> bool:
    """Whether `why_passed_over` may have a reason, whether this is the name of a file or of a folder."""
    return name.startswith(".") or name in _SYSTEM


def why_passed_over(name: str, *, folder: bool) -> str | None:
    """Why a file or folder of this name is used only if the user names it; None for an ordinary name."""
    if name.startswith("."):
        return _HIDDEN_FOLDERS if folder else _HIDDEN_FILES
    return _SYSTEM_FOLDERS if folder and name in _SYSTEM else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; not if that cannot be known, which `stat_listed` will raise."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_utf8(name: str) -> bool:
    """Whether a name is UTF-8, and so can be written into a plan."""
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False


def escape_bytes(path: str) -> str:
    """A path with bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _files_at_url(folder: str, account: Account, listing: Callable[[Any, str], Any]) -> list[SourceFile]:
    """The files that `listing` finds, given fsspec's file system and the path on it. A folder that is passed over is
    counted once, as on a disk."""
    fs, inner = storage.filesystem(folder)
    try:
        found = list(listing(fs, inner))
    except FileNotFoundError:
        return []
    except Exception as error:
        raise cannot_read(folder, error) from error
    root, files, passed_over = fs.unstrip_protocol(inner).rstrip("/"), [], dict[str, str]()
    for info in found:
        path = fs.unstrip_protocol(info["name"])
        parts = path[len(root) + 1 :].split("/")
        if info["type"] != "file" or not parts[-1]:  # without a name: the mark of a folder that an S3 console made
            continue
        if outermost := _outermost_passed_over(parts):
            count, reason = outermost
            passed_over["/".join((root, *parts[:count]))] = reason
        elif "::" in path:
            account.skip(CHAINED_NAMES, path)
        else:
            files.append(file_at_url(path, info))
    for path, reason in sorted(passed_over.items()):
        account.skip(reason, path)
    return sorted(files)


def _outermost_passed_over(parts: list[str]) -> tuple[int, str] | None:
    """How many parts of a path lead to the first folder in it, or to the file, that is passed over, and why."""
    for count, part in enumerate(parts, 1):
        if is_private(part) and (reason := why_passed_over(part, folder=count < len(parts))):
            return count, reason
    return None


def local_file(path: str, status: os.stat_result) -> SourceFile:
    """A local file by its status."""
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def file_at_url(path: str, info: dict[str, Any]) -> SourceFile:
    """A file at a URL, by what fsspec knows of it. Raises SourceError for a name with :: in it, which could be planned
    but never opened."""
    if "::" in path:
        raise SourceError(f"{path} has :: in its name, which URLs are chained by", remedy="rename it, or leave it out")
    value = next((info[name] for name in _MODIFIED if info.get(name)), 0)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = 0
    seconds = value.timestamp() if isinstance(value, datetime) else float(value)
    # Whole seconds: a listing may say more than the answer about one file, and both must agree.
    return SourceFile(path, int(info["size"] or 0), int(seconds) * 10**9)


def cannot_read(path: str, error: Exception) -> SourceError:
    """The error for storage that does not answer or refuses, and for memory that ran out: a plan made without the file
    would lack it for good."""
    if isinstance(error, MemoryError):
        why = str(error) or "no more is to be had"
        remedy = "end other programs, or take a machine with more memory, and run the same command again"
        return SourceError(f"memory ran out while {line(path)} was read: {why}", remedy=remedy)
    why = (isinstance(error, OSError) and error.strerror) or str(error)
    remedy = "check the path, the credentials and the network; run the same command again once the storage answers"
    return SourceError(f"{line(path)} cannot be read: {why}", remedy=f"{remedy}, or leave the file out")
