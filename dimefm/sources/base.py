"""What a source is, and what it gives. Every source passes tests/contracts/source_contract.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cache_schemas.plan import SourceFile
from dimefm.sources.account import Account

_Sample = TypeVar("_Sample", covariant=True)
_Item = TypeVar("_Item")


class ImageSample(NamedTuple):
    """Where one encoded image lies, as sources.read_image reads it. `key` is its name within the source.

    `file` is an absolute path or a URL, and the image is its bytes [offset, offset + size); in a .tsv these are base64.
    In a Parquet file, `file` is PATH#COLUMN, or PATH#COLUMN[N] for element N of a list, `offset` is the number of the
    row and `size` the length of the image. `captions` are the image's own sentences, each as text_lines.clean makes it,
    where the source was asked for them.
    """

    key: str
    file: str
    offset: int
    size: int
    captions: tuple[str, ...] = ()


class TextSample(NamedTuple):
    """One sentence, never empty, with single spaces as its only white space and none at its ends; text_lines.clean
    makes such a text. `key` is its name within the source."""

    key: str
    text: str


class Source(Protocol[_Sample]):
    """Files, and the samples in them. Any object with these two methods is a source: no base class is needed.

    For example, the images that a text file names, one path per line::

        class ListedImages:
            def __init__(self, path: str) -> None:
                self._files = stat_files(Path(path).read_text().splitlines())

            def files(self) -> list[SourceFile]:
                return self._files

            def samples(self, account: Account) -> Iterator[ImageSample]:
                for file in self._files:
                    if file.path.endswith(".jpg"):
                        yield ImageSample(Path(file.path).stem, file.path, 0, file.size)
                    else:
                        account.skip("files that are not JPEGs", file.path)

    It is handed in as `CacheConfig(sources=(ListedImages("list.txt"),), ...)`, alone or beside paths; the store's
    attributes then name its class. examples/custom_image_source.py is a whole script.

    Planning goes through the samples once and writes them down: sample r becomes row r of the store. Later the bytes
    that a sample names are read, also in other processes and on other machines, so its file must stay where it is. The
    same command goes on with a store only if `files` gives the same files as before, unchanged.
    """

    def files(self) -> list[SourceFile]:
        """Every file that samples lie in, in the order of the samples: absolute path or URL, size and time, as
        files.stat_files finds them. Called several times, so nothing is opened. Empty for samples that are in no file.
        """
        ...

    def samples(self, account: Account) -> Iterator[_Sample]:
        """Every sample, in an order that never changes while the files do not; each call begins anew.

        Keys are not empty, and should be unique: those that are not are counted. What is not used goes into
        `account.skip`, and a file that can be read only in part into `account.problem`; the other files go on. Raises
        SourceError where the storage does not answer, since what is not planned would be missing for good.
        """
        ...


def names_of(arguments: Sequence[str | Source[Any]]) -> tuple[str, ...]:
    """The arguments as a store's attributes and messages have them. A Source is called by its `name`, if it has one, or
    else by its class."""
    return tuple(one if isinstance(one, str) else _name_of(one) for one in arguments)


def _name_of(source: Source[Any]) -> str:
    return str(getattr(source, "name", f"{type(source).__qualname__} (a Source)"))


def paths_of(arguments: Sequence[str | Source[Any]]) -> tuple[str, ...]:
    """The arguments that are paths, URLs or patterns: all but the Sources."""
    return tuple(one for one in arguments if isinstance(one, str))


class Joined(Generic[_Item]):
    """Several sources, one after the other, as one source."""

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
