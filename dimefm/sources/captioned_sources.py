"""Sources of images with captions from elsewhere: from files beside the images, and from annotations of COCO."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, Source
from dimefm.sources.caption_reader import MOST_BYTES, CaptionReader
from dimefm.sources.captions import CaptionField
from dimefm.sources.files import stat_files
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage
from dimefm.system.read_ahead import reading_ahead

_AT_ONCE = 4096  # images whose files of captions are read ahead


class CaptionsBeside:
    """Image files with the captions in the files `beside` them, which are by the image's path up to its extension."""

    def __init__(self, images: Source[ImageSample], beside: Mapping[str, SourceFile], captions: CaptionField) -> None:
        self.images, self._beside, self._captions = images, beside, captions

    def files(self) -> list[SourceFile]:
        """The images and the files beside them, by path."""
        return sorted([*self.images.files(), *self._beside.values()])

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """The images, in order."""
        reader, samples = CaptionReader("files of captions", account), self.images.samples(account)
        read = partial(_read, self._beside)
        while batch := list(islice(samples, _AT_ONCE)):
            for sample, (path, data) in zip(batch, reading_ahead(read, batch, batch[0].file), strict=True):
                if len(data) > MOST_BYTES:
                    account.skip(f"files of captions of more than {MOST_BYTES >> 20} MB", path)
                elif path:
                    yield sample._replace(captions=reader.of_file(data, self._captions.json_field, path))
                    continue
                yield sample
        reader.finish()


def _read(beside: Mapping[str, SourceFile], image: ImageSample) -> tuple[str, bytes]:
    """Path and bytes of the file of an image's captions; empty where there is none. Raises SourceError."""
    file = beside.get(image.file.rpartition(".")[0])
    if file is None:
        return "", b""
    try:
        return file.path, storage.read_bytes(file.path, 0, MOST_BYTES + 1)
    except (OSError, MemoryError) as error:
        raise cannot_read(file.path, error) from error


@dataclass
class _Annotated:
    """An image in a file of annotations: its name without the extension, as written, and its captions."""

    name: str
    captions: list[str | None] = field(default_factory=list)
    key: str = ""  # of the image that took them


class CocoCaptions:
    """Images of any source with the captions in COCO's annotations, such as captions_train2017.json: `images` with `id`
    and `file_name`, and `annotations` with `image_id` and `caption`.

    They are found by the last part of the key. Where images of several folders have one name, the folders in
    `file_name` must tell them apart.
    """

    def __init__(self, images: Source[ImageSample], path: str) -> None:
        """Raises AbsentError where the file does not exist."""
        self._images, self._file = images, stat_files([path])[0]

    def files(self) -> list[SourceFile]:
        """Those of the images, then the annotations."""
        return [*self._images.files(), self._file]

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """The images, in order. Annotations without an image are counted at the end. Raises SourceError for a file that
        is not of COCO, and where two images could have the same captions."""
        path = self._file.path
        named, reader = _annotations(path, account), CaptionReader(path, account)
        for sample in self._images.samples(account):
            found = _of_key(sample.key, named.get(sample.key.rpartition("/")[2], ()))
            if found is None:
                yield sample
                continue
            if found.key:
                what = f"{path}: {found.name} may be the image {found.key!r} or {sample.key!r}"
                raise SourceError(what, remedy="name only the folder or the tars of images that the file is about")
            found.key = sample.key
            yield sample._replace(captions=reader.of_values(found.captions, f"{path}: {found.name}"))
        reader.finish()
        for one in (one for several in named.values() for one in several if not one.key):
            account.skip("images of COCO's annotations that are not in the sources", f"{path}: {one.name}")


def _of_key(key: str, candidates: Sequence[_Annotated]) -> _Annotated | None:
    """The one whose name is the end of the key, or the reverse."""
    ends = (one for one in candidates if f"/{key}".endswith(f"/{one.name}") or f"/{one.name}".endswith(f"/{key}"))
    return next(ends, None)


def _annotations(path: str, account: Account) -> dict[str, list[_Annotated]]:
    """The annotated images by the last part of their names. Raises SourceError."""
    try:
        document = json.loads(storage.read_bytes(path).decode("utf-8", errors="replace"))
        images = {one["id"]: _Annotated(one["file_name"].rpartition(".")[0]) for one in document["images"]}
        captions = [(one["image_id"], one["caption"]) for one in document["annotations"]]
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = f"{path} holds no annotations as COCO writes them: images with id and file_name, annotations with"
        what += " image_id and caption"
        raise SourceError(what, remedy="give one such as captions_train2017.json") from None
    for image, caption in captions:
        if image not in images:
            account.skip("captions of COCO's annotations whose image is not listed there", f"{path}: {image}")
        else:
            images[image].captions.append(caption if isinstance(caption, str) else None)
    named: dict[str, list[_Annotated]] = {}
    for one in images.values():
        named.setdefault(one.name.rpartition("/")[2], []).append(one)
    return named
