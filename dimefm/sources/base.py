"""The source protocol. Every source passes tests/contracts/source_contract.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cache_schemas.plan import SourceFile
from dimefm.sources.account import Account

_Sample = TypeVar("_Sample", covariant=True)
_Item = TypeVar("_Item")


class ImageSample(NamedTuple):
    """One encoded image, as sources.read_image reads it. `key` is its name within the source.

    `file` is a path or URL, and [offset, offset + size) the bytes of the image, or of its base64 text in a .tsv. For
    a Parquet file `file` is PATH#COLUMN, or PATH#COLUMN[N] for what is at N in a list, `offset` the number of the row
    and `size` the length of the image.
    """

    key: str
    file: str
    offset: int
    size: int


class TextSample(NamedTuple):
    """One sentence, never empty; white space within it is single spaces, and there is none at its ends."""

    key: str
    text: str


class Source(Protocol[_Sample]):
    """A list of files and the samples in them, both in an order that never changes while the files do not."""

    def files(self) -> list[SourceFile]:
        """Every file, in the order of their samples. Cheap: nothing is opened."""
        ...

    def samples(self, account: Account) -> Iterator[_Sample]:
        """Every sample. What is no sample is counted in `account`; a file that cannot be read through is a problem
        there, and the rest go on."""
        ...


def names_of(arguments: Sequence[str | Source[Any]]) -> tuple[str, ...]:
    """The arguments as a store's attributes and messages have them. A Source is named by its class."""
    return tuple(one if isinstance(one, str) else f"{type(one).__qualname__} (a Source)" for one in arguments)


def paths_of(arguments: Sequence[str | Source[Any]]) -> tuple[str, ...]:
    """The arguments that are paths, URLs or patterns: all but the Sources."""
    return tuple(one for one in arguments if isinstance(one, str))


class Joined(Generic[_Item]):
    """Several sources one after the other, as one."""

    def __init__(self, parts: Sequence[Source[_Item]]) -> None:
        self.parts = parts

    def files(self) -> list[SourceFile]:
        """The files of all parts, in the order of the parts."""
        return [file for part in self.parts for file in part.files()]

    def samples(self, account: Account) -> Iterator[_Item]:
        """The samples of all parts, in the order of the parts."""
        for part in self.parts:
            yield from part.samples(account)


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def file_key(path: str, root: str) -> str:
    """The key of an image that is a file of its own: its path below the folder `root`, without the extension."""
    folder, slash, name = path[len(root) :].lstrip("/").rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"
