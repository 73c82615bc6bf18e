"""Globs: the files and folders that a pattern with *, ? or [ matches, local or at a URL."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, NamedTuple

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
    local_file,
    require_link_targets,
    stat_listed,
    why_passed_over,
)
from dimefm.system import storage

_MARKS = "*?["


class FileOrFolder(NamedTuple):
    """What a path leads to: a file, or a folder, of which `file` is None."""

    path: str
    file: SourceFile | None

    @classmethod
    def local(cls, path: str, status: os.stat_result) -> FileOrFolder:
        """One on this machine, by its status."""
        return cls(path, None if stat.S_ISDIR(status.st_mode) else local_file(path, status))

    @classmethod
    def at_url(cls, url: str, info: dict[str, Any]) -> FileOrFolder:
        """One at a URL, by what fsspec knows of it. Raises SourceError as `file_at_url`."""
        return cls(url, None if info["type"] == "directory" else file_at_url(url, info))


class _Entry(NamedTuple):
    """A file or folder that a folder's listing names; at a URL with what fsspec knows of it."""

    path: str
    is_folder: bool
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def has_marks(text: str) -> bool:
    """Whether a pattern, or a part of one, may match more than its own name."""
    return any(mark in text for mark in _MARKS)


def match_glob(argument: str, account: Account) -> list[FileOrFolder]:
    """The files and folders that a pattern matches, sorted by path. What is passed over goes into `account`; a hidden
    file is matched only by a part that begins with a dot. Raises AbsentError where nothing matches, and SourceError
    where that cannot be known."""
    path = storage.absolute(argument)
    fs: Any = None
    pattern = path  # fsspec is not asked for a local one: it would take :: for a chain
    if storage.is_url(path):
        fs, pattern = storage.filesystem(path)
    if "**" in pattern:
        places = _match_at_any_depth(fs, pattern, account)
        _require_some(argument, places)
    else:
        try:
            entries = _match_by_level(fs, pattern, account)
        except SourceError:
            raise
        except Exception as error:
            raise cannot_read(path, error) from error
        _require_some(argument, entries)
        places = _places_at_url(fs, entries, account) if fs else _local_places(entries, account)
    return sorted(places, key=lambda place: place.path)


def _require_some(argument: str, matches: Sequence[object]) -> None:
    if not matches:
        raise AbsentError(f"{argument} matches no file", remedy="check the path; quote globs in the shell")


def _match_at_any_depth(fs: Any, pattern: str, account: Account) -> list[FileOrFolder]:
    """What a pattern with ** matches: files by their whole path, and folders, unless its last part is stars alone.
    What lies in a folder that matches is not matched again. Raises SourceError as `files_below`."""
    first_mark = min(place for mark in _MARKS if (place := pattern.find(mark)) >= 0)
    root, scheme = pattern[:first_mark].rpartition("/")[0], fs.unstrip_protocol("") if fs else ""
    matches, passed_over = re.compile(glob_translate(pattern)).match, Account()
    files = {file.path[len(scheme) :]: file for file in files_below(scheme + root or "/", passed_over)}
    folders = set[str]()
    if pattern.rpartition("/")[2].strip("*"):
        folders = {name for file in files for name in _parents(file) if name.startswith(root) and matches(name)}
    found = [FileOrFolder(scheme + name, None) for name in folders if folders.isdisjoint(_parents(name))]
    for name, file in files.items():
        if matches(name) and folders.isdisjoint(_parents(name)):
            found.append(FileOrFolder(file.path, file))
    if not folders:  # else each folder is walked again when it is opened, and counted then
        account.add(passed_over)
    return found


def _parents(path: str) -> Iterator[str]:
    return map(str, PurePosixPath(path).parents)


def _match_by_level(fs: Any, pattern: str, account: Account, *, only_folders: bool = False) -> list[_Entry]:
    """The entries that a pattern without ** matches: its last part, in each folder that the rest of it matches.

    With `only_folders` the caller has no use for files, and none is counted. Raises OSError for a folder that cannot be
    listed, which fsspec's own glob passes over.
    """
    parent, _, last = pattern.rpartition("/")
    if has_marks(parent):
        above = _match_by_level(fs, parent, account, only_folders=True)
        folders = {entry.path for entry in above if entry.is_folder}
    else:
        folders = {parent or "/"}
    found = []
    for entry in (one for folder in folders for one in _list_folder(fs, folder, was_listed=has_marks(parent))):
        if entry.path in folders or not fnmatchcase(entry.name, last):  # some URLs list a folder in itself
            continue
        is_named = last == entry.name or (last.startswith(".") and entry.name.startswith("."))
        reason = None if is_named else why_passed_over(entry.name, folder=entry.is_folder)
        if reason is None:
            found.append(entry)
        elif entry.is_folder or not only_folders:
            account.skip(reason, fs.unstrip_protocol(entry.path) if fs else entry.path)
    return found


def _list_folder(fs: Any, folder: str, *, was_listed: bool) -> list[_Entry]:
    """What is in a folder; nothing where it does not exist, unless a listing had it a moment ago. Raises OSError."""
    try:
        if fs:
            infos = fs.ls(folder, detail=True)
            return [_Entry(info["name"].rstrip("/"), info["type"] == "directory", info) for info in infos]
        with os.scandir(folder) as entries:
            return [_Entry(f"{folder.rstrip('/')}/{entry.name}", is_folder(entry), {}) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        if was_listed:
            raise
    except PermissionError:
        if not folder.endswith("/lost+found"):  # of a disk, where it is root's
            raise
    return []


def _local_places(entries: list[_Entry], account: Account) -> list[FileOrFolder]:
    places, lost_links = [], list[str]()
    for path in sorted(entry.path for entry in entries):
        if not is_utf8(path):
            account.skip(NOT_UTF8_NAMES, escape_bytes(path))
        elif status := stat_listed(path, account, lost_links):
            places.append(FileOrFolder.local(path, status))
    require_link_targets(lost_links)
    return places


def _places_at_url(fs: Any, entries: list[_Entry], account: Account) -> list[FileOrFolder]:
    places = []
    for entry in entries:
        url = fs.unstrip_protocol(entry.info["name"])
        if "::" in url:
            account.skip(CHAINED_NAMES, url)
        else:
            places.append(FileOrFolder.at_url(url, entry.info))
    return places
