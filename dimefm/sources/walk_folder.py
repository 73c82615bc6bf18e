"""Everything that lies in a folder, local or at a URL: files are listed, what cannot be used is counted.

Links to folders are followed, but not back to a folder that they are in. Hidden files and folders, and those that
systems keep for themselves, are counted: they are thumbnails, checkpoints of notebooks, resource forks, what was
deleted.
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
_GONE = "links to what is not there"
_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "modified")  # as s3fs, adlfs, gcsfs, ... call it
_Folder = tuple[str, frozenset[tuple[int, int]]]
"""A folder, and what tells it and those it was reached through from all others: device and number."""


def files_below(folder: str, account: Account) -> list[SourceFile]:
    """The files in a folder and in all folders below it, sorted by path. What is passed over goes into `account`.

    Raises SourceError for what is there and cannot be read, and for links into folders that are not there: it would be
    left out of the plan for good.
    """
    if storage.is_url(folder):
        return _at_url(folder, account, storage.walk)
    return sorted(_walk(folder, account, deep=True))


def files_in(folder: str, keep: Callable[[str], bool], account: Account) -> list[SourceFile]:
    """As `below`, the files in the folder itself whose name `keep` wants."""
    if storage.is_url(folder):
        found = _at_url(folder, account, lambda fs, inner: fs.ls(inner, detail=True))
    else:
        found = sorted(_walk(folder, account, deep=False))
    return [file for file in found if keep(file.path.rpartition("/")[2])]


def _walk(root: str, account: Account, *, deep: bool) -> Iterator[SourceFile]:
    waiting, lost = [_root(root)], list[str]()
    while waiting:
        folder, above = waiting.pop()
        for entry in _entries(folder, account, is_root=folder == root):
            path = f"{folder.rstrip('/')}/{entry.name}"
            if not is_utf8(entry.name):
                account.skip(NOT_UTF8_NAMES, escape_bytes(path))
                continue
            if is_private(entry.name) and (reason := why_passed_over(entry.name, folder=is_folder(entry))):
                account.skip(reason, path)
                continue
            status = stat_listed(path, account, lost)
            if status is None:
                continue
            if stat.S_ISREG(status.st_mode):
                yield local_file(path, status)
            elif not stat.S_ISDIR(status.st_mode):
                account.skip("pipes, sockets and devices", path)
            elif deep:
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    account.skip("links back to a folder that they are in", path)
                else:
                    waiting.append((path, above | {identity}))
    require_link_targets(lost)


def _root(folder: str) -> _Folder:
    above, place = set[tuple[int, int]](), Path(os.path.realpath(folder))
    for one in (place, *place.parents):
        with suppress(OSError):  # what is wrong is said when it is listed
            status = one.stat()
            above.add((status.st_dev, status.st_ino))
    return folder, frozenset(above)


def _entries(folder: str, account: Account, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError as error:
        if is_root:
            return []
        raise cannot_read(folder, error) from error
    except OSError as error:
        if _is_lost_and_found(folder, error):
            account.skip("folders called lost+found, which are the file system's", folder)
            return []
        raise cannot_read(folder, error) from error


def stat_listed(path: str, account: Account, lost: list[str]) -> os.stat_result | None:
    """The status of a local path that was listed; None where it is passed over. Links into folders that are not there
    are put into `lost`."""
    try:
        return os.stat(path)  # noqa: PTH116
    except FileNotFoundError as error:
        if not os.path.islink(path):  # noqa: PTH114
            raise cannot_read(path, error) from error
        if os.path.exists(os.path.dirname(os.path.realpath(path))):  # noqa: PTH110, PTH120
            account.skip(_GONE, path)
        else:
            lost.append(path)
    except OSError as error:
        if os.path.islink(path) and error.errno == errno.ELOOP:  # noqa: PTH114
            account.skip("links to themselves", path)
        elif _is_lost_and_found(path, error):
            account.skip("folders called lost+found, which are the file system's", path)
        else:
            raise cannot_read(path, error) from error
    return None


def require_link_targets(lost: list[str]) -> None:
    """Raises SourceError for links into folders that are not there: a disk that is not mounted looks like that."""
    if lost:
        where = f"{line(lost[0])} -> {line(os.path.realpath(lost[0]))}"
        what = f"{len(lost):,} links lead into folders that are not there, such as {where}"
        if len(lost) == 1:
            what = f"a link leads into a folder that is not there: {where}"
        raise SourceError(what, remedy="mount what they lead to, or delete them; then run the same command again")


def _is_lost_and_found(path: str, error: OSError) -> bool:
    return isinstance(error, PermissionError) and path.endswith("/lost+found")


def is_private(name: str) -> bool:
    """Whether a file or folder may be one that is used only where it is named."""
    return name.startswith(".") or name in _SYSTEM


def why_passed_over(name: str, *, folder: bool) -> str | None:
    """Why a file or folder of this name is used only where it is named; None where it is an ordinary one."""
    if name.startswith("."):
        return _HIDDEN_FOLDERS if folder else _HIDDEN_FILES
    return _SYSTEM_FOLDERS if folder and name in _SYSTEM else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or leads to one. What is wrong with a link is found out when it is looked at."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written into a plan."""
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False


def escape_bytes(path: str) -> str:
    """A path with bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _at_url(folder: str, account: Account, listing: Callable[[Any, str], Any]) -> list[SourceFile]:
    fs, inner = storage.filesystem(folder)
    try:
        found = list(listing(fs, inner))
    except FileNotFoundError:
        return []
    except Exception as error:
        raise cannot_read(folder, error) from error
    root, files, private = fs.unstrip_protocol(inner).rstrip("/"), [], dict[str, str]()
    for info in found:
        path = fs.unstrip_protocol(info["name"])
        parts = path[len(root) + 1 :].split("/")
        if info["type"] != "file" or not parts[-1]:  # no name: the mark that S3 consoles put into a folder they make
            continue
        for at, part in enumerate(parts, 1):
            if is_private(part) and (reason := why_passed_over(part, folder=at < len(parts))):
                private["/".join((root, *parts[:at]))] = reason
                break
        else:
            if "::" in path:
                account.skip(CHAINED_NAMES, path)
            else:
                files.append(file_at_url(path, info))
    for place, reason in sorted(private.items()):
        account.skip(reason, place)
    return sorted(files)


def local_file(path: str, status: os.stat_result) -> SourceFile:
    """A local file by its status."""
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def file_at_url(path: str, info: dict[str, Any]) -> SourceFile:
    """A file at a URL by what fsspec knows of it. Raises SourceError for a name that is a chained URL, which could be
    planned, and then never be opened."""
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
    """Storage that does not answer, or refuses, or memory that ran out: planned without what is there, it would be
    missing for good."""
    if isinstance(error, MemoryError):
        why = str(error) or "no more is to be had"
        remedy = "end other programs, or take a machine with more memory, and run the same command again"
        return SourceError(f"memory ran out while {line(path)} was read: {why}", remedy=remedy)
    why = (isinstance(error, OSError) and error.strerror) or str(error)
    remedy = "check the path, the credentials and the network; run the same command again once the storage answers"
    return SourceError(f"{line(path)} cannot be read: {why}", remedy=f"{remedy}, or leave the file out")
