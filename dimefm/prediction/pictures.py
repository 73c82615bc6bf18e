"""The images that are asked for: found before the model is loaded, and read one after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cache_schemas import Status
from dimefm.errors import DimefmError, SourceError
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import ImageSample
from dimefm.sources.files import look_up
from dimefm.sources.image_kinds import CONTAINERS
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.parquet import split_column
from dimefm.sources.read_image import read_image
from dimefm.sources.text_lines import encoding_by_mark
from dimefm.system import storage
from dimefm.system.named_paths import named
from dimefm.system.near_names import did_you_mean_path

STDIN = "-"


class Listed(NamedTuple):
    """The path or URL of an image, as the file `where` names it."""

    path: str
    where: str


class Picture(NamedTuple):
    """An image: its name for the user, and where it is, or its bytes."""

    name: str
    place: ImageSample | Listed | bytes

    @property
    def url(self) -> bool:
        """Whether it is at a URL."""
        return not isinstance(self.place, bytes) and storage.is_url(self.name)


def find_pictures(images: Sequence[str], images_from: str | None, account: Account) -> list[Picture]:
    """The images that arguments name, then those in a list, then one on standard input. What is passed over in folders
    is counted in `account`. Raises SourceError for an argument or a list that does not exist, or where there is no
    image."""
    paths = [one for one in images if one != STDIN]
    found: list[Picture] = []
    if paths:
        below = "" if any(os.path.isabs(one) for one in paths) else f"{os.getcwd()}/"  # noqa: PTH109, PTH117
        samples = open_image_source(paths, account=account).samples(account)
        found += [Picture(_name(sample, below), sample) for sample in samples]
        if not found:
            what = f"no image in {', '.join(paths)}{found_instead(account.lines())}"
            raise SourceError(what, remedy="name images, or folders, tars or tables of images")
    if images_from:
        found += _listed(images_from)
    if STDIN in images:
        found.append(Picture(STDIN, sys.stdin.buffer.read(MAX_BYTES + 1)))
    return found


def _name(sample: ImageSample, below: str) -> str:
    """A file by its path, from the folder `below` on where it is in that; an image in a tar or a table also by its
    key."""
    path, column = split_column(sample.file)
    name = path.removeprefix(below)
    return f"{name}: {sample.key}" if column is not None or path.lower().endswith(CONTAINERS) else name


def _listed(images_from: str) -> list[Picture]:
    """The images of a list: one per line, or, as `find -print0` writes them, ended by zero bytes."""
    where = "the list on standard input" if images_from == STDIN else images_from
    try:
        data = sys.stdin.buffer.read() if images_from == STDIN else storage.read_bytes(storage.absolute(images_from))
        text = data.decode(encoding_by_mark(data), "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        remedy = did_you_mean_path(images_from, "give a file with the path of an image on each line")
        raise SourceError(f"{images_from}: {why}", remedy=remedy) from None
    lines = text.split("\0") if "\0" in text else [one.removesuffix("\r") for one in text.split("\n")]
    found = [Picture(one, Listed(one, where)) for one in lines if one.strip()]
    if not found:
        raise SourceError(f"{where} names no image", remedy="write the path of an image on each line")
    return found


def read_picture(picture: Picture) -> bytes:
    """The bytes of an image. Raises DecodeError, with the reason, where they cannot be had."""
    place = picture.place
    if isinstance(place, bytes):
        if len(place) > MAX_BYTES:
            raise DecodeError(Status.TOO_LARGE, f"more than {MAX_BYTES:,} bytes")
        return place
    try:
        found = read_image(_sample(place) if isinstance(place, Listed) else place, accept_missing=True)
    except DimefmError as error:
        raise DecodeError(Status.MISSING, error.what) from None
    if isinstance(found, DecodeError):
        raise found
    return found


def _sample(one: Listed) -> ImageSample:
    """Where the image of a list is. Raises DecodeError where there is no file, and a DimefmError for a place that a
    list may not name."""
    found = look_up(named(storage.absolute(one.path), one.where))
    if found is None:
        raise DecodeError(Status.MISSING, "it does not exist")
    if found.file is None:
        raise DecodeError(Status.MISSING, "it is a folder: name it as an argument")
    return ImageSample(one.path, found.path, 0, found.file.size)
