"""Which kind of file with images a file is: by its name, or by its first bytes where it has no extension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.images.decode import sniff
from dimefm.sources import parquet, tsv_images
from dimefm.sources.account import Account
from dimefm.sources.file_names import extension_of, why_member_not_read, why_not_read
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage
from dimefm.system.first_bytes import HEAD_BYTES, describe
from dimefm.system.inert_text import line
from dimefm.system.read_ahead import reading_ahead

IMAGE_EXTENSIONS = frozenset({
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm"),
    *("pnm", "avif", "heic", "heif", "jp2", "j2k", "jpx", "qoi", "tga", "ico", "pcx"),
})  # fmt: skip
"""Extensions of images, also of those that need a further library: a row that cannot be decoded for it says so."""

TAR, PARQUET, TSV, IMAGE = ".tar", parquet.SUFFIX, tsv_images.SUFFIX, "image"
CONTAINERS = (TAR, PARQUET, TSV)

_DOTTED = "members whose extension has more than one part (a key ends at the first dot)"


def by_kind(files: Sequence[SourceFile], account: Account | None) -> dict[str, list[SourceFile]]:
    """The files by kind: one of CONTAINERS, or IMAGE. Others are counted in `account`; without an account they are a
    SourceError."""
    kinds: dict[str, list[SourceFile]] = {}
    extensions = [extension_of(file.path) for file in files]
    bare = [file for file, extension in zip(files, extensions, strict=True) if not extension]
    heads = reading_ahead(_read_head, bare, bare[0].path) if bare else iter(())
    tables = (file.path for file in files if file.path.endswith(TSV))
    line_indexes = {path.removesuffix(TSV) + tsv_images.INDEX_SUFFIX for path in tables}
    for file, extension in zip(files, extensions, strict=True):
        if file.path in line_indexes:
            continue  # it is read with its table
        kind, reason = _by_name(file.path, extension) if extension else _by_head(next(heads))
        if parquet.COLUMN_MARK in file.path:
            kind, reason = "", f"names with {parquet.COLUMN_MARK} in them, which stands before a column (rename them)"
        if kind:
            kinds.setdefault(kind, []).append(file)
        elif account is not None:
            account.skip(reason, file.path)
        else:
            what = f"{line(file.path)} is neither a {', '.join(CONTAINERS)}, an image nor a folder"
            raise SourceError(f"{what}, but one of the {reason}", remedy="give tars, tables, images or folders")
    return kinds


@lru_cache(1000)
def why_no_image(extension: str) -> str:
    """The reason for a member of a tar that is no image, by its extension as base.split_key gives it."""
    return _DOTTED if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else why_member_not_read(extension)


def _by_name(path: str, extension: str) -> tuple[str, str]:
    """The kind and an empty reason, or an empty kind and the reason."""
    if extension in IMAGE_EXTENSIONS:
        return IMAGE, ""
    if f".{extension}" in CONTAINERS:
        if extension == "tar" or path.endswith(f".{extension}"):
            return f".{extension}", ""
        return "", "tables whose extension is in capitals (rename them)"
    return "", why_not_read(path)


def _by_head(head: bytes) -> tuple[str, str]:
    """As `_by_name`, by the first bytes."""
    if sniff(head):
        return IMAGE, ""
    known = describe(head)
    return "", f"files without an extension, each {known}" if known else "files without an extension that are no images"


def _read_head(file: SourceFile) -> bytes:
    try:
        return storage.read_bytes(file.path, 0, HEAD_BYTES)
    except (OSError, MemoryError) as error:
        raise cannot_read(file.path, error) from error
