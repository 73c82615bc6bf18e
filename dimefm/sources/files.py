"""The files that arguments name, with their sizes and times; and opening one, local or at a URL."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from fsspec.utils import glob_translate

from cache_schemas.plan import SourceFile
from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.walk_folder import (
    CHAINED_NAMES,
    NOT_UTF8_NAMES,
    cannot_read,
    escape_bytes,
    file_at_url,
    files_below,
    is_folder,
    is_utf8,
    require_link_targets,
    stat_listed,
    why_passed_over,
)
from dimefm.system import storage
from dimefm.system.read_ahead import URL_BLOCK, reading_ahead

_MAGIC = "*?["
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class FileOrFolder(NamedTuple):
    """What an argument names: a file, or a folder where `file` is None."""

    path: str
    file: SourceFile | None


def expand(argument: str, account: Account | None = None) -> list[FileOrFolder]:
    """`shard-{000..009}.tar` and `shard-*.tar` as what they stand for: ranges in their order, globs sorted.

    A path that exists is itself, whatever is in its name. What a glob matches and is passed over goes into `account`;
    hidden files are matched only by a pattern that begins with a dot. Raises AbsentError where a glob matches nothing
    or a file named by a range is not there, SourceError where that cannot be known.
    """
    if not is_utf8(argument):
        raise SourceError(f"{escape_bytes(argument)} is not UTF-8", remedy="rename it")
    if storage.is_url(argument):
        if "::" in argument:
            raise SourceError(f"{argument} has :: in it, which URLs are chained by", remedy="rename it, or fetch it")
        fs, _ = storage.filesystem(argument)
        fs.invalidate_cache()  # listings that fsspec kept from earlier in this process
    if found := look_up(argument):
        return [found]
    names = _without_ranges(argument)
    if any(mark in argument for mark in _MAGIC):
        return [place for name in names for place in _glob(name, account or Account())]
    return _look_up(names)


def existing_names(argument: str) -> list[str]:
    """The argument, or nothing where what it names is not there; of a range, the names that are there. Raises
    SourceError where that cannot be known."""
    try:
        expand(argument)
    except AbsentError:
        names = _without_ranges(argument)
        return [] if names == [argument] else [one for name in names for one in existing_names(name)]
    return [argument]


def is_glob(argument: str, places: Sequence[FileOrFolder]) -> bool:
    """Whether an argument that was expanded to `places` does not name them one by one."""
    return any(mark in argument for mark in _MAGIC) and [p.path for p in places] != [storage.absolute(argument)]


def stat_files(paths: list[str]) -> list[SourceFile]:
    """The files with their sizes and times. Raises SourceError for one that is not there."""
    return [place.file or SourceFile(place.path, 0, 0) for place in _look_up(paths)]


def describe_change(before: SourceFile, now: SourceFile) -> str | None:
    """How a file differs from what it was; None where it does not. A time that is 0 is not known."""
    if before.size != now.size:
        return f"{now.path} has changed: {before.size:,} bytes when it was planned, {now.size:,} now"
    if before.modified and now.modified and before.modified != now.modified:
        return f"{now.path} has changed: written {_time(before)} when it was planned, {_time(now)} now"
    return None


def _time(file: SourceFile) -> str:
    return datetime.fromtimestamp(file.modified / 1e9, UTC).isoformat(sep=" ", timespec="milliseconds")


def open_seekable(path: str) -> BinaryIO:
    """A file that can be read in any order, held in blocks of bounded size. Raises OSError."""
    if storage.is_url(path):
        return io.BufferedReader(_UrlFile(path), URL_BLOCK)
    return Path(path).open("rb", buffering=1 << 17)


class _UrlFile(io.RawIOBase):
    """A file at a URL, by byte ranges. It holds no connection, so a process may be forked around it."""

    def __init__(self, path: str) -> None:
        fs, inner = storage.filesystem(path)
        with storage.asking(path):
            self._path, self._position, self._size = path, 0, int(fs.size(inner))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        data = storage.read_bytes(self._path, self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _without_ranges(argument: str) -> list[str]:
    match = _RANGE.search(argument)
    if not match:
        return [argument]
    first, last = match.groups()
    if int(last) < int(first):
        raise SourceError(f"{argument}: the range {match.group()} counts down", remedy="write {low..high}")
    numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _without_ranges(argument[: match.start()] + n + argument[match.end() :])]


def _look_up(names: list[str]) -> list[FileOrFolder]:
    found = list(reading_ahead(look_up, names, names[0]))
    for name, place in zip(names, found, strict=True):
        if place is None:
            raise AbsentError(f"{name} does not exist", remedy="check the path")
    return [place for place in found if place is not None]


def look_up(name: str) -> FileOrFolder | None:
    """The file or folder at a path; None where there is neither. Raises SourceError where that cannot be known."""
    path = storage.absolute(name)
    try:
        if storage.is_url(path):
            fs, inner = storage.filesystem(path)
            with storage.asking(path):
                info = fs.info(inner)
            return FileOrFolder(path, None if info["type"] == "directory" else file_at_url(path, info))
        status = os.stat(path)  # noqa: PTH116
        folder = stat.S_ISDIR(status.st_mode)
        return FileOrFolder(path, None if folder else SourceFile(path, status.st_size, status.st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        raise cannot_read(path, error) from error


def _glob(name: str, account: Account) -> list[FileOrFolder]:
    path = storage.absolute(name)
    fs: Any = None
    inner = path  # of a local one fsspec is not asked, which takes :: for a chain
    if storage.is_url(path):
        fs, inner = storage.filesystem(path)
    if "**" in inner:
        if places := _deep(inner, fs.unstrip_protocol("") if fs else "", account):
            return places
        raise _matches_nothing(name)
    try:
        found = _matching(fs, inner, storage.is_url(path), account)
    except SourceError:
        raise
    except Exception as error:
        raise cannot_read(path, error) from error
    if not found:
        raise _matches_nothing(name)
    if not storage.is_url(path):
        return _local_places(sorted(info["name"] for info in found), account)
    places = []
    for info in found:
        url = fs.unstrip_protocol(info["name"])
        if "::" in url:
            account.skip(CHAINED_NAMES, url)
            continue
        places.append(FileOrFolder(url, None if info["type"] == "directory" else file_at_url(url, info)))
    return sorted(places, key=lambda place: place.path)


def _matches_nothing(name: str) -> AbsentError:
    return AbsentError(f"{name} matches no file", remedy="check the path; quote globs in the shell")


def _deep(pattern: str, scheme: str, account: Account) -> list[FileOrFolder]:
    """What a pattern with ** matches, by name: files, and folders where its last part is more than stars; what is in
    such a folder is not matched again. Raises SourceError as `below`."""
    top = pattern[: min(place for mark in _MAGIC if (place := pattern.find(mark)) >= 0)].rpartition("/")[0]
    own, matches = Account(), re.compile(glob_translate(pattern)).match
    files = {file.path[len(scheme) :]: file for file in files_below(scheme + top or "/", own)}
    folders = set[str]()
    if pattern.rpartition("/")[2].strip("*"):
        above = {str(parent) for name in files for parent in PurePosixPath(name).parents}
        folders = {name for name in above if name.startswith(top) and matches(name)}
    inner = {name for name in folders if not folders.isdisjoint(map(str, PurePosixPath(name).parents))}
    places = [FileOrFolder(scheme + name, None) for name in folders - inner]
    for name, file in files.items():
        if matches(name) and folders.isdisjoint(map(str, PurePosixPath(name).parents)):
            places.append(FileOrFolder(file.path, file))
    if not folders:  # which are gone through, and counted, by themselves
        account.add(own)
    return sorted(places, key=lambda place: place.path)


def _local_places(names: list[str], account: Account) -> list[FileOrFolder]:
    places, lost = [], list[str]()
    for name in names:
        if not is_utf8(name):
            account.skip(NOT_UTF8_NAMES, escape_bytes(name))
        elif status := stat_listed(name, account, lost):
            folder = stat.S_ISDIR(status.st_mode)
            places.append(FileOrFolder(name, None if folder else SourceFile(name, status.st_size, status.st_mtime_ns)))
    require_link_targets(lost)
    return places


def _matching(
    fs: Any, pattern: str, url: bool, account: Account, *, only_folders: bool = False
) -> list[dict[str, Any]]:
    """What is known of the files and folders that match. Raises OSError for a folder that cannot be listed, which
    fsspec's own glob passes over."""
    folder, _, name = pattern.rpartition("/")
    several = any(mark in folder for mark in _MAGIC)
    folders = {folder or "/"}
    if several:
        above = _matching(fs, folder, url, account, only_folders=True)
        folders = {info["name"].rstrip("/") for info in above if info["type"] == "directory"}
    found = []
    for one in folders:
        try:
            if url:
                found += fs.ls(one, detail=True)
            else:
                with os.scandir(one) as entries:
                    kinds = ((e.name, "directory" if is_folder(e) else "file") for e in entries)
                    found += [_entry(f"{one.rstrip('/')}/{own}", kind) for own, kind in kinds]
        except (FileNotFoundError, NotADirectoryError):
            if several:  # it was there a moment ago
                raise
        except PermissionError:
            if not one.endswith("/lost+found"):  # of a disk, where it is root's
                raise
    matching = []
    for info in found:
        path = info["name"].rstrip("/")
        own = path.rpartition("/")[2]
        if path in folders or not fnmatchcase(own, name):
            continue
        folder = info["type"] == "directory"
        reason = None if name == own or (name[0] == own[0] == ".") else why_passed_over(own, folder=folder)
        if reason is None:
            matching.append(info)
        elif folder or not only_folders:
            account.skip(reason, fs.unstrip_protocol(path) if url else path)
    return matching


def _entry(path: str, kind: str) -> dict[str, Any]:
    return {"name": path, "type": kind}


def require_damaged(path: str, error: Exception) -> None:
    """Raises SourceError unless `error` is of what the file holds: a damaged file is read as far as it goes."""
    if isinstance(error, OSError | MemoryError) and not isinstance(error, gzip.BadGzipFile):
        raise cannot_read(path, error) from error
