"""Images from WebDataset tars and from folders."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec

from dimefm import storage
from dimefm.errors import SourceError
from dimefm.sources.base import ImageSample, Joined, Source, SourceFile, expand, stat_files

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jfif"})


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class WebDataset:
    """Tar files with one image a sample (key.jpg, key.png, ...); other members of a sample are passed over."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = sorted(paths)

    def files(self) -> list[SourceFile]:
        """The tars."""
        return stat_files(self._paths)

    def samples(self, report: Callable[[str], None]) -> Iterator[ImageSample]:
        """Images by tar and by place in it. Only headers are read."""
        for path in self._paths:
            for member in tar_members(path, report):
                key, extension = split_key(member.name)
                if extension in IMAGE_EXTENSIONS and key.rpartition("/")[2]:
                    yield ImageSample(key, path, member.offset_data, member.size)


def tar_members(path: str, report: Callable[[str], None]) -> Iterator[tarfile.TarInfo]:
    """Regular files in a tar, in order. What follows a broken header is lost; `report` is told so."""
    count = 0
    try:
        with fsspec.open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen: unbounded on a large archive
                if member.isreg():
                    count += 1
                    yield member
            # tarfile takes a header that it cannot read, or no header at all, for the end; an archive ends with zeros.
            raw.seek(tar.offset)
            if (block := raw.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a damaged header" if block else "no end mark: it was cut short")
    except (tarfile.TarError, EOFError) as error:
        report(f"{path}: broken after {count} members ({error}); what follows is lost")
    except OSError as error:
        report(f"{path}: cannot be read ({error})")


class ImageFolder:
    """A folder tree of image files; the key of one is its path within the folder, without the extension.

    Hidden files are passed over: they are thumbnails and resource forks, not images.
    """

    def __init__(self, root: str) -> None:
        self._root = storage.absolute(root)
        self._files: list[SourceFile] | None = None

    def files(self) -> list[SourceFile]:
        """Every image file below the folder, by name. The tree is walked once."""
        if self._files is None:
            self._files = stat_files(self._walk())
        return self._files

    def _walk(self) -> list[str]:
        if not storage.is_url(self._root):
            return sorted(str(p) for p in Path(self._root).rglob("*") if _is_image(p.name) and p.is_file())
        fs, inner = storage.filesystem(self._root)
        return sorted(fs.unstrip_protocol(p) for p in fs.find(inner) if _is_image(p))

    def samples(self, report: Callable[[str], None]) -> Iterator[ImageSample]:
        """One sample a file."""
        for file in self.files():
            key = file.path[len(self._root) :].lstrip("/").rpartition(".")[0]
            yield ImageSample(key, file.path, 0, file.size)


def _is_image(name: str) -> bool:
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return stem != "" and not stem.startswith(".") and extension.lower() in IMAGE_EXTENSIONS


def open_image_source(arguments: list[str]) -> Source[ImageSample]:
    """The source that the arguments name: tars (globs and {000..009} ranges too), folders of tars, image folders.

    Raises SourceError where one does not exist, holds no image, or is of another kind.
    """
    parts: list[Source[ImageSample]] = []
    for argument in arguments:
        paths = expand(argument)
        for path in paths:
            parts.append(_open_one(argument, path))
    counts = Counter(file.path for part in parts for file in part.files())
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise SourceError(f"{min(repeated)} is given more than once", remedy="name each file or folder once")
    return Joined(parts)


def _open_one(argument: str, path: str) -> Source[ImageSample]:
    if path.endswith(".tar"):
        return WebDataset([path])
    if not storage.is_url(path) and not Path(path).is_dir():
        raise SourceError(f"{argument}: {path} is neither a .tar nor a folder", remedy="give tars or image folders")
    tars = [storage.join(path, name) for name in storage.listing(path) if name.endswith(".tar")]
    if tars:
        return WebDataset(tars)
    folder = ImageFolder(path)
    if not folder.files():
        kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise SourceError(f"{argument} holds no .tar and no image", remedy=f"images end in: {kinds}")
    return folder
