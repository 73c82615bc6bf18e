"""Images from tars, tables, files and folders: what the arguments of cache-images name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import ImageSample, Joined, Source, file_key, split_key
from dimefm.sources.captions import CaptionField, caption_images, files_beside
from dimefm.sources.file_names import HIDDEN_MEMBERS, is_hidden_member
from dimefm.sources.files import expand, is_glob
from dimefm.sources.forward_reader import URL_LEAP
from dimefm.sources.globs import FileOrFolder
from dimefm.sources.image_kinds import CONTAINERS, IMAGE, IMAGE_EXTENSIONS, PARQUET, TAR, TSV, by_kind, why_no_image
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.side_files import find_side_files, read_side_file
from dimefm.sources.tar import TarMember, tar_members
from dimefm.sources.tsv_images import TsvImages
from dimefm.sources.walk_folder import files_below
from dimefm.system import storage
from dimefm.system.progress import Progress, amount
from dimefm.system.read_ahead import URL_BLOCK, in_order

_PREFERRED = ("jpg", "png", "jpeg", "webp")
_FURTHER = "further images of the same key (one is used: the first of jpg, png, jpeg, webp, others)"


class WebDataset:
    """Tars with one image per sample: KEY.jpg, KEY.png, ... Other members of a sample are counted, unless they hold its
    `captions`."""

    def __init__(self, files: Sequence[SourceFile], captions: CaptionField | None = None) -> None:
        self._files, self._captions = files, captions

    def files(self) -> list[SourceFile]:
        """The tars, as given."""
        return list(self._files)

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by tar and by place in it. Only headers are read. At URLs several tars are read at a time, and a side
        file in place of the headers where there is one that fits."""
        if not self._files or not storage.is_url(self._files[0].path):
            for file in self._files:
                yield from self._of_tar(file.path, tar_members(file.path, account), account)
        else:
            yield from self._at_urls(account)

    def _at_urls(self, account: Account) -> Iterator[ImageSample]:
        side_files = find_side_files(self._files)
        tars = [(file, side_files.get(file.path)) for file in self._files]
        walked = [file.size for file, side_file in tars if not side_file]
        blocks = sum(-(-size // URL_BLOCK) for size in walked)
        with Progress("planning", len(tars), "tar") as progress:
            progress.note(
                f"{len(tars) - len(walked):,} tars by their side files, {len(walked):,} by their headers: at most "
                f"{amount(sum(walked))} in {blocks:,} requests, less where members are larger than {amount(URL_LEAP)}"
            )
            for done, (images, own) in enumerate(in_order(self._list_at_url, tars), 1):
                account.add(own)
                yield from images
                progress.at(done)

    def _list_at_url(self, pair: tuple[SourceFile, SourceFile | None]) -> tuple[list[ImageSample], Account]:
        """The images of a tar, by its side file if it has one that fits, else by its headers."""
        tar, side_file = pair
        account = Account()
        members = read_side_file(tar, side_file, account) if side_file else None
        found = members if members is not None else tar_members(tar.path, account)
        return list(self._of_tar(tar.path, found, account)), account

    def _of_tar(self, path: str, members: Iterable[TarMember], account: Account) -> Iterator[ImageSample]:
        if self._captions is None:
            return _images(path, members, account)
        members = list(members)
        images = list(_images(path, members, account, beside=self._captions.extension))
        return caption_images(path, members, images, self._captions, account)


def _images(path: str, members: Iterable[TarMember], account: Account, beside: str = "") -> Iterator[ImageSample]:
    """The images of a tar. If several with the same key follow each other, one is used, as in open_clip: the one whose
    extension comes first in _PREFERRED, else the first in the tar. Members with the extension `beside` are used
    elsewhere."""
    waiting: ImageSample | None = None  # the best image of the last key
    kind = last = ""  # its extension and its key
    for name, offset, size in members:
        key, extension = split_key(name)
        if is_hidden_member(name, key):
            account.skip(HIDDEN_MEMBERS, f"{path}: {name}")
        elif extension not in IMAGE_EXTENSIONS:
            if not beside or extension != beside:
                account.skip(why_no_image(extension), f"{path}: {name}")
        elif key != last:
            if waiting:
                yield waiting
            waiting, last, kind = ImageSample(key, path, offset, size), key, extension
        elif _rank(extension) < _rank(kind):
            account.skip(_FURTHER, f"{path}: {key}.{kind}")
            waiting, kind = ImageSample(key, path, offset, size), extension
        else:
            account.skip(_FURTHER, f"{path}: {name}")
    if waiting:
        yield waiting


def _rank(extension: str) -> int:
    return _PREFERRED.index(extension) if extension in _PREFERRED else len(_PREFERRED)


class ImageFiles:
    """Image files, one per sample; the key is the path below `root` without the extension, which it keeps where several
    files of one folder differ only in that. Files that are in `taken` when their turn comes are counted."""

    def __init__(self, root: str, files: Sequence[SourceFile], taken: Container[str] = ()) -> None:
        self._root, self._files, self._taken = root.rstrip("/"), files, taken

    def files(self) -> list[SourceFile]:
        """The files, as given."""
        return list(self._files)

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """One sample per file."""
        for alike in _by_stem(self._untaken(account)):
            for key, file in zip(_keys(alike, self._root), alike, strict=True):
                yield ImageSample(key, file.path, 0, file.size)

    def _untaken(self, account: Account) -> Iterator[SourceFile]:
        for file in self._files:
            if file.path in self._taken:
                account.skip("images that are rows of a Parquet file, too (each is used once, as a row)", file.path)
            else:
                yield file


def _by_stem(files: Iterable[SourceFile]) -> Iterator[list[SourceFile]]:
    """Sorted files in runs. All whose path is the same up to the extension are in one run, since those that begin with
    the same letters follow each other; others may be in it too."""
    run, stem = list[SourceFile](), ""
    for file in files:
        if run and not file.path.startswith(stem):
            yield run
            run = []
        if not run:
            stem = f"{file.path.rpartition('.')[0]}."
        run.append(file)
    if run:
        yield run


def _keys(files: list[SourceFile], root: str) -> list[str]:
    """The keys of files below `root`: those that would be the same keep their extensions. Beside cat.jpg and cat.png
    that is cat.jpg.png too."""
    keys = [file_key(file.path, root) for file in files]
    while len(keys) > 1 and (repeated := {key for key, count in Counter(keys).items() if count > 1}):
        names = [file.path[len(root) :].lstrip("/") for file in files]
        before, keys = keys, [name if key in repeated else key for key, name in zip(keys, names, strict=True)]
        if keys == before:  # a file is there twice
            break
    return keys


class ImageFolder(ImageFiles):
    """The image files in a folder and those below it, by path. Whatever else is there is counted in `account`."""

    def __init__(self, root: str, account: Account) -> None:
        root = storage.absolute(root)
        kinds = by_kind(files_below(root, account), account)
        for kind in CONTAINERS:
            for file in kinds.get(kind, ()):
                account.skip(f"{kind} files in a folder of images", file.path)
        super().__init__(root, kinds.get(IMAGE, ()))


def open_image_source(
    arguments: Sequence[str | Source[ImageSample]],
    column: str | None = None,
    account: Account | None = None,
    captions: str | None = None,
) -> Source[ImageSample]:
    """The source that the arguments name: .tar, .parquet, .tsv and image files, also by globs and ranges such as
    {000..009}, and folders, each of which stands for all of these files in it, at any depth: first tars, then tables,
    then images. From Python, an argument may also be a Source, which is taken as it is.

    What is in a folder or matches a glob and is not used is counted in `account`. A .parquet beside a .tar of the same
    name is counted unread: downloaders write captions there. `column` is the column of images in Parquet files. With
    `captions` (see CaptionField.parse) the samples have their captions; a Source that is taken as it is brings its own.

    Raises SourceError where an argument does not exist, holds no image or is of another kind, where a file is given
    twice, and where no Parquet file is given to have the column.
    """
    account = Account() if account is None else account
    where = CaptionField.parse(captions) if captions is not None else None
    beside = where if where and not where.coco else None  # in the same places as the images
    parts: list[Source[ImageSample]] = []
    for argument in arguments:
        if not isinstance(argument, str):
            parts.append(argument)
            continue
        places = expand(argument, account)
        files = [place.file for place in places if place.file]
        found = list(_sources(files, _root(argument, places), column, beside, account, found=is_glob(argument, places)))
        for place in places:
            if place.file is None:
                found += _sources(files_below(place.path, account), place.path, column, beside, account, found=True)
        if not found:
            what = f"{argument} holds no {', '.join(CONTAINERS)} and no image{found_instead(account.lines())}"
            raise SourceError(what, remedy=f"images end in: {', '.join(sorted(IMAGE_EXTENSIONS))}")
        parts += found
    _require_each_once(parts)
    tables = [part for part in parts if isinstance(part, ParquetImages)]
    if column is not None and not tables:
        what = f"--column {column}: the images are in no .parquet file, and only those have columns to choose from"
        raise SourceError(what, remedy="leave it out")
    if tables:
        tables[0].check()
    if where and where.coco:
        from dimefm.sources.captioned_sources import CocoCaptions

        return CocoCaptions(Joined(parts), where.coco)
    return Joined(parts)


def _require_each_once(parts: Sequence[Source[ImageSample]]) -> None:
    images: list[Source[ImageSample]] = [getattr(part, "images", part) for part in parts]  # without CaptionsBeside
    counts = Counter(file.path for part in images for file in part.files())
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise SourceError(f"{min(repeated)} is given more than once", remedy="name each file or folder once")


def _sources(
    files: Sequence[SourceFile],
    root: str,
    column: str | None,
    captions: CaptionField | None,
    account: Account,
    *,
    found: bool,
) -> Iterator[Source[ImageSample]]:
    """The sources that files of any kind are. Files that were `found` in a folder or by a glob may hold no images."""
    may_be_beside = f".{captions.extension}" if captions and found else None
    kinds = by_kind([file for file in files if not _ends_in(file, may_be_beside)], account if found else None)
    tars, tables, images = kinds.get(TAR, []), kinds.get(PARQUET, []), kinds.get(IMAGE, [])
    beside = files_beside(images, files, captions) if captions and images else {}
    used = {file.path for file in beside.values()}
    by_kind([file for file in files if _ends_in(file, may_be_beside) and file.path not in used], account)  # count them
    if found:
        stems = {file.path.rpartition(".")[0] for file in tars}
        for table in [file for file in tables if file.path.removesuffix(PARQUET) in stems]:
            account.skip("tables beside a tar of the same name", table.path)
            tables.remove(table)
    if tars:
        yield WebDataset(tars, captions)
    taken = set[str]()
    if tables:
        yield ParquetImages(tables, column, captions.name if captions else None, found=found, taken=taken)
    if TSV in kinds:
        yield TsvImages(kinds[TSV], captions.name if captions else None, found=found)
    if images:
        plain = ImageFiles(root, images, taken)
        if captions:
            from dimefm.sources.captioned_sources import CaptionsBeside

            yield CaptionsBeside(plain, beside, captions)
        else:
            yield plain


def _ends_in(file: SourceFile, suffix: str | None) -> bool:
    return suffix is not None and file.path.endswith(suffix)


def _root(argument: str, places: Sequence[FileOrFolder]) -> str:
    """The folder below which the keys of image files begin: the last that the argument names without a pattern."""
    path = storage.absolute(argument)
    if [place.path for place in places] != [path]:
        path = re.split(r"[*?[{]", path, maxsplit=1)[0]
    return path.rpartition("/")[0]
