"""The files that arguments name, with their sizes and times; and opening one, local or at a URL."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cache_schemas.plan import SourceFile
from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.globs import FileOrFolder, has_marks, match_glob
from dimefm.sources.walk_folder import cannot_read, escape_bytes, is_utf8
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.read_ahead import URL_BLOCK, reading_ahead

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(argument: str, account: Account | None = None) -> list[FileOrFolder]:
    """The files and folders that an argument names: a path, a range such as `shard-{000..009}.tar`, in its order, or a
    glob such as `shard-*.tar`, sorted.

    A path that exists stands for itself, even with braces or stars in its name. What a glob matches and is passed over
    goes into `account`; hidden files are matched only by a part that begins with a dot. Raises AbsentError where a glob
    matches nothing or a file of a range does not exist, and SourceError where that cannot be known.
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
    names = _expand_ranges(argument)
    if has_marks(argument):
        return [place for name in names for place in match_glob(name, account or Account())]
    return _look_up_all(names)


def existing_names(argument: str) -> list[str]:
    """The argument if what it names exists, else nothing; of a range with gaps, the names that exist. Raises
    SourceError where that cannot be known."""
    try:
        expand(argument)
    except AbsentError:
        names = _expand_ranges(argument)
        if names == [argument]:
            return []
        return [one for name in names for one in existing_names(name)]
    return [argument]


def is_glob(argument: str, places: Sequence[FileOrFolder]) -> bool:
    """Whether `argument`, which was expanded to `places`, is a pattern and not a path with such a name."""
    return has_marks(argument) and [p.path for p in places] != [storage.absolute(argument)]


def stat_files(paths: list[str]) -> list[SourceFile]:
    """The files with their sizes and times. Raises AbsentError for one that does not exist, and SourceError where that
    cannot be known."""
    return [place.file or SourceFile(place.path, 0, 0) for place in _look_up_all(paths)]


def look_up(name: str) -> FileOrFolder | None:
    """The file or folder at a path; None where there is neither. Raises SourceError where that cannot be known."""
    path = storage.absolute(name)
    try:
        if storage.is_url(path):
            fs, inner = storage.filesystem(path)
            with storage.asking(path):
                info = fs.info(inner)
            return FileOrFolder.at_url(path, info)
        return FileOrFolder.local(path, os.stat(path))  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        raise cannot_read(path, error) from error


def _look_up_all(names: list[str]) -> list[FileOrFolder]:
    found = list(reading_ahead(look_up, names, names[0]))
    for name, place in zip(names, found, strict=True):
        if place is None:
            raise AbsentError(f"{name} does not exist", remedy=did_you_mean_path(name, "check the path"))
    return [place for place in found if place is not None]


def describe_change(before: SourceFile, now: SourceFile) -> str | None:
    """How a file differs from what it was; None where it does not. A time of 0 is unknown, and not compared."""
    if before.size != now.size:
        return f"{now.path} has changed: {before.size:,} bytes when it was planned, {now.size:,} now"
    if before.modified and now.modified and before.modified != now.modified:
        return f"{now.path} has changed: written {_time(before)} when it was planned, {_time(now)} now"
    return None


def _time(file: SourceFile) -> str:
    return datetime.fromtimestamp(file.modified / 1e9, UTC).isoformat(sep=" ", timespec="milliseconds")


def open_seekable(path: str) -> BinaryIO:
    """A file that can be read in any order, buffered in blocks of bounded size. Raises OSError."""
    if storage.is_url(path):
        return io.BufferedReader(_UrlFile(path), URL_BLOCK)
    return Path(path).open("rb", buffering=1 << 17)


class _UrlFile(io.RawIOBase):
    """A file at a URL, read by byte ranges. It holds no connection, so a process that has one open may fork."""

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


def _expand_ranges(argument: str) -> list[str]:
    match = _RANGE.search(argument)
    if not match:
        return [argument]
    first, last = match.groups()
    if int(last) < int(first):
        raise SourceError(f"{argument}: the range {match.group()} counts down", remedy="write {low..high}")
    numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _expand_ranges(argument[: match.start()] + n + argument[match.end() :])]
