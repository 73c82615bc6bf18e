"""Images from WebDataset tars and from folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from dimefm import storage
from dimefm.errors import SourceError
from dimefm.progress import Progress, amount
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, Joined, Source, SourceFile
from dimefm.sources.files import URL_BLOCK, below, children, expand, in_order
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.side_files import find_side_files, read_side_file
from dimefm.sources.tar import TarMember, tar_members
from dimefm.sources.tsv_images import TsvImages
from dimefm.sources.window import URL_LEAP

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jfif"})

_KINDS = (".tar", ".parquet", ".tsv")


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class WebDataset:
    """Tar files with one image a sample (key.jpg, key.png, ...); other members of a sample are counted."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files

    def files(self) -> list[SourceFile]:
        """The tars, as given."""
        return list(self._files)

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by tar and by place in it. Only headers are read; of tars at URLs, several at a time, and where there
        is a side file that fits, it instead of them."""
        if not self._files or not storage.is_url(self._files[0].path):
            for file in self._files:
                yield from _images(file.path, tar_members(file.path, account), account)
        else:
            yield from self._at_urls(account)

    def _at_urls(self, account: Account) -> Iterator[ImageSample]:
        sides = find_side_files(self._files)
        asked = [(file, sides.get(file.path)) for file in self._files]
        walked = [file.size for file, side in asked if not side]
        blocks = sum(-(-size // URL_BLOCK) for size in walked)
        with Progress("planning", len(asked), "tar") as progress:
            progress.note(
                f"{len(asked) - len(walked):,} tars by their side files, {len(walked):,} by their headers: at most "
                f"{amount(sum(walked))} in {blocks:,} requests, less where members are larger than {amount(URL_LEAP)}"
            )
            for done, (images, own) in enumerate(in_order(_listed, asked), 1):
                account.add(own)
                yield from images
                progress.at(done)


def _images(path: str, members: Iterable[TarMember], account: Account) -> Iterator[ImageSample]:
    for name, offset, size in members:
        key, extension = split_key(name)
        if not key or key[-1] == "/":
            account.skip("hidden members of tars", f"{path}: {name}")
        elif extension in IMAGE_EXTENSIONS:
            yield ImageSample(key, path, offset, size)
        elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            account.skip(
                "members whose extension has more than one part (a key ends at the first dot)", f"{path}: {name}"
            )
        else:
            account.skip(f"members of tars that end in .{extension}", f"{path}: {name}")


def _listed(asked: tuple[SourceFile, SourceFile | None]) -> tuple[list[ImageSample], Account]:
    """The images of a tar, by its side file where that fits."""
    tar, side = asked
    account = Account()
    members = read_side_file(tar, side, account) if side else None
    found = members if members is not None else tar_members(tar.path, account)
    return list(_images(tar.path, found, account)), account


def _is_image(name: str) -> bool:
    stem, _, extension = name.rpartition(".")
    return stem != "" and extension.lower() in IMAGE_EXTENSIONS


class ImageFolder:
    """A folder tree of image files; the key of one is its path within the folder, without the extension.

    Hidden files are passed over: they are thumbnails and resource forks, not images.
    """

    def __init__(self, root: str) -> None:
        self._root = storage.absolute(root)
        self._files: list[SourceFile] | None = None

    def files(self) -> list[SourceFile]:
        """Every image file below the folder, by path. The tree is walked once."""
        if self._files is None:
            self._files = below(self._root, _is_image)
        return self._files

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """One sample a file."""
        for file in self.files():
            key = file.path[len(self._root) :].lstrip("/").rpartition(".")[0]
            yield ImageSample(key, file.path, 0, file.size)


def open_image_source(
    arguments: list[str], column: str | None = None, account: Account | None = None
) -> Source[ImageSample]:
    """The source that the arguments name: .tar, .parquet and .tsv files (globs and {000..009} ranges too), and folders.

    A folder is all its tars if it has any, since downloaders put a .parquet of captions beside each; else all its
    .parquet or all its .tsv files, and an error where it has both; else a tree of image files. `column` is the one
    with the images in Parquet files.

    Raises SourceError where an argument does not exist, holds no image or is of another kind, where a file is given
    twice, and where no file has the column.
    """
    parts: list[Source[ImageSample]] = []
    for argument in arguments:
        for path, places in groupby(expand(argument), lambda place: None if place.file else place.path):
            files = [place.file for place in places if place.file]
            parts.extend(_files(argument, files, column) if path is None else _folder(argument, path, column))
    counts = Counter(file.path for part in parts for file in part.files())
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise SourceError(f"{min(repeated)} is given more than once", remedy="name each file or folder once")
    tables = [part for part in parts if isinstance(part, ParquetImages)]
    if column is not None and not tables:
        what = f"--column {column}: there is no .parquet among the images, and only those have columns to choose from"
        raise SourceError(what, remedy="leave it out")
    if tables:
        tables[0].check()
    return Joined(parts)


def _files(argument: str, files: Sequence[SourceFile], column: str | None) -> Iterator[Source[ImageSample]]:
    for suffix, group in groupby(files, lambda file: "." + file.path.rpartition(".")[2]):
        alike = list(group)
        if suffix == ".tar":
            yield WebDataset(alike)
        elif suffix == ".parquet":
            yield ParquetImages(alike, column)
        elif suffix == ".tsv":
            yield TsvImages(alike)
        else:
            what = f"{argument}: {alike[0].path} is neither a {', '.join(_KINDS)} nor a folder"
            raise SourceError(what, remedy="give tars, tables or image folders")


def _folder(argument: str, path: str, column: str | None) -> Iterator[Source[ImageSample]]:
    found = children(path, lambda name: name.endswith(_KINDS))
    files = [file for file in found if file.path.endswith(".tar")] or found
    kinds = sorted({"." + file.path.rpartition(".")[2] for file in files})
    if len(kinds) > 1:
        what = f"{argument} holds both {' and '.join(kinds)} files"
        raise SourceError(what, remedy=f"name those you mean, such as {storage.join(argument, '*' + kinds[0])}")
    if files:
        yield from _files(argument, files, column)
        return
    folder = ImageFolder(path)
    if not folder.files():
        what = f"{argument} holds no {', '.join(_KINDS)} and no image"
        raise SourceError(what, remedy=f"images end in: {', '.join(sorted(IMAGE_EXTENSIONS))}")
    yield folder
