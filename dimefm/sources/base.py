"""The source protocol. Every source passes tests/contracts/source_contract.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dimefm import storage
from dimefm.errors import SourceError

_Sample = TypeVar("_Sample", covariant=True)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: absolute path or URL, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class ImageSample:
    """One encoded image: the bytes [offset, offset + size) of `file`. `key` is its name within the source."""

    key: str
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class TextSample:
    """One sentence, never empty; white space within it is single spaces, and there is none at its ends."""

    key: str
    text: str


class Source(Protocol[_Sample]):
    """A list of files and the samples in them, both in an order that never changes while the files do not."""

    def files(self) -> list[SourceFile]:
        """Every file, sorted by path. Cheap: nothing is opened."""
        ...

    def samples(self, report: Callable[[str], None]) -> Iterator[_Sample]:
        """Every sample. A file that cannot be read through is given to `report` in a line, and the rest go on."""
        ...


class Joined(Generic[_Item]):
    """Several sources one after the other, as one."""

    def __init__(self, parts: Sequence[Source[_Item]]) -> None:
        self._parts = parts

    def files(self) -> list[SourceFile]:
        """The files of all parts, in the order of the parts."""
        return [file for part in self._parts for file in part.files()]

    def samples(self, report: Callable[[str], None]) -> Iterator[_Item]:
        """The samples of all parts, in the order of the parts."""
        for part in self._parts:
            yield from part.samples(report)


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(argument: str) -> list[str]:
    """`shard-{000..009}.tar` and `shard-*.tar` as the paths they stand for, sorted.

    A path that exists is itself, whatever is in its name. Raises SourceError where a glob matches nothing or a file
    named by a range is not there.
    """
    path = storage.absolute(argument)
    if storage.exists(path):
        return [path]
    match = _RANGE.search(argument)
    if match:
        first, last = match.groups()
        if int(last) < int(first):
            raise SourceError(f"{argument}: the range {match.group()} counts down", remedy="write {low..high}")
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        return [p for n in numbers for p in expand(argument[: match.start()] + n + argument[match.end() :])]
    if any(c in argument for c in "*?["):
        fs, inner = storage.filesystem(storage.absolute(argument))
        found = sorted(fs.glob(inner))
        if not found:
            raise SourceError(f"{argument} matches no file", remedy="check the path; quote globs in the shell")
        return [fs.unstrip_protocol(p) if storage.is_url(argument) else p for p in found]
    raise SourceError(f"{argument} does not exist", remedy="check the path")


def stat_files(paths: list[str]) -> list[SourceFile]:
    """The files with their sizes. Raises SourceError for one that is not there."""
    files = []
    for path in paths:
        try:
            if storage.is_url(path):
                fs, inner = storage.filesystem(path)
                files.append(SourceFile(path, int(fs.size(inner))))
            else:
                files.append(SourceFile(path, Path(path).stat().st_size))
        except FileNotFoundError:
            raise SourceError(f"{path} does not exist", remedy="check the path") from None
    return files
