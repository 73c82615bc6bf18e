"""Captions, the sentences that belong to an image: where they are, and those in tars and beside image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, split_key
from dimefm.sources.caption_reader import MOST_BYTES, CaptionReader
from dimefm.sources.file_names import is_hidden_member
from dimefm.sources.forward_reader import open_window
from dimefm.sources.image_kinds import CONTAINERS, IMAGE_EXTENSIONS
from dimefm.sources.tar import TarMember
from dimefm.sources.walk_folder import cannot_read, files_in

_COCO = "coco:"


@dataclass(frozen=True)
class CaptionField:
    """Where the captions of an image are, as `--captions` says it.

    `name` is a column of a table, or else the `extension` of a text file beside the image, KEY.txt, with a caption per
    line. With `json_field` that file is JSON, and the captions are a field of it. With `coco` they are in an annotation
    file of COCO, by the names of the images.
    """

    name: str
    extension: str = ""
    json_field: str | None = None
    coco: str | None = None

    @classmethod
    def parse(cls, text: str) -> CaptionField:
        """From `txt`, `json:FIELD`, `coco:FILE.json`, or the name or number of a column. Raises SourceError."""
        if text.startswith(_COCO) and text != _COCO:
            return cls(text, coco=text.removeprefix(_COCO))
        extension, colon, json_field = text.partition(":")
        extension = extension.lower().removeprefix(".")
        if not extension or (colon and (extension != "json" or not json_field)):
            remedy = "give txt, json:FIELD, coco:FILE.json, or a column of the tables with the images"
            raise SourceError(f"--captions {text!r} is no place of captions", remedy=remedy)
        if extension == "json" and not colon:
            what = "--captions json does not say in which field the captions are"
            raise SourceError(what, remedy="give --captions json:FIELD, such as json:caption")
        if extension in IMAGE_EXTENSIONS or f".{extension}" in CONTAINERS:
            raise SourceError(f"--captions {text}: files that end in .{extension} are images", remedy="give txt")
        return cls(text, extension, json_field or None)


def files_beside(
    images: Sequence[SourceFile], listed: Sequence[SourceFile], captions: CaptionField
) -> dict[str, SourceFile]:
    """The files of captions beside image files, by the path that both have up to the extension. They are taken from
    those that were `listed` with the images, or else the images' folders are listed."""
    suffix = f".{captions.extension}"
    candidates = [file for file in listed if file.path.endswith(suffix)]
    if not candidates:
        for folder in sorted({image.path.rpartition("/")[0] for image in images}):
            candidates += files_in(folder, lambda name: name.endswith(suffix), Account())
    stems = {image.path.rpartition(".")[0] for image in images}
    return {stem: file for file in candidates if (stem := file.path.removesuffix(suffix)) in stems}


def caption_images(
    path: str,
    members: Sequence[TarMember],
    images: Sequence[ImageSample],
    captions: CaptionField,
    account: Account,
) -> Iterator[ImageSample]:
    """The images of the tar at `path` with their captions: those in the members of the same key. Where several images
    have one key, nobody knows whose they are, and they are counted. Raises SourceError where the tar cannot be read."""
    counts, reader = Counter(image.key for image in images), CaptionReader(path, account)
    found: dict[str, tuple[str, ...]] = {}
    try:
        with open_window(path) as window:
            for name, offset, size in members:
                key, extension = split_key(name)
                where = f"{path}: {name}"
                if extension != captions.extension or is_hidden_member(name, key):
                    continue
                if counts[key] != 1:
                    many = "a key that several images of a tar have" if counts[key] else "no image of the same tar"
                    account.skip(f"members with the captions of {many}", where)
                elif size > MOST_BYTES:
                    account.skip(f"members with captions of more than {MOST_BYTES >> 20} MB", where)
                elif len(data := window.get(offset, size)) < size:
                    account.skip("members with captions that are cut short", where)
                else:
                    found[key] = found.get(key, ()) + reader.of_file(data, captions.json_field, where)
    except OSError as error:
        raise cannot_read(path, error) from error
    reader.finish()
    for image in images:
        yield image._replace(captions=found.get(image.key, ()))
