"""The layout of WebDataset tars: each image beside a file of the same key with its label or captions."""

from __future__ import annotations

import io
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.image_set import Records, parse_label
from dimefm.datasets.layouts import UnlabelledError, add_class_texts, natural_order, split_files
from dimefm.datasets.unused_files import count_unused
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, split_key
from dimefm.sources.file_names import HIDDEN_MEMBERS, is_hidden_member
from dimefm.sources.image_kinds import IMAGE_EXTENSIONS, why_no_image
from dimefm.sources.tar import TarMember, tar_members
from dimefm.system import storage
from dimefm.system.read_ahead import in_order

_LABEL_EXTENSIONS, _CAPTIONS_EXTENSION = ("cls", "npy"), "txt"


class _Annotation(NamedTuple):
    """The member of a tar that holds the label, the labels or the captions of the image with the same key."""

    tar: str
    key: str
    extension: str
    member: TarMember


def read_webdataset(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """Tars of images with labels or captions. An image with both is read with its label."""
    tars = split_files(folder, split, ".tar", definition)
    if not tars:
        return None
    records = add_class_texts(Records(where=folder, layout="webdataset", samples=[], files=tars), folder)
    classes = len(records.classnames) if records.classnames else definition.class_count if definition else None
    read = partial(_read_annotation, classes=classes)
    found: list[Any] = []
    for tar in sorted(tars, key=lambda file: natural_order(file.path)):
        images, annotations = _members(tar.path, records.account)
        _require_pairs(tar.path, images, annotations)
        wanted = [annotations[key] for key in images]
        found += in_order(read, wanted) if storage.is_url(tar.path) else map(read, wanted)
        records.samples += [ImageSample(key, tar.path, m.offset, m.size) for key, m in images.items()]
    count_unused(records, folder, tars[0].path.rpartition("/")[0], split, own=definition is None)
    are_captions = {isinstance(one, tuple) for one in found}
    if len(are_captions) > 1:
        what = f"{folder} has labels for some images and captions for others"
        raise SourceError(what, remedy="put them into two folders")
    if are_captions == {True}:
        records.captions = [list(one) for one in found]
    else:
        records.labels = found
    return records


def _members(tar: str, account: Account) -> tuple[dict[str, TarMember], dict[str, _Annotation]]:
    """The images of a tar and the annotations of images, by key. Other members are counted in `account`."""
    damage = Account()
    images: dict[str, TarMember] = {}
    annotations: dict[str, _Annotation] = {}
    for member in tar_members(tar, damage):
        key, extension = split_key(member.name)
        if is_hidden_member(member.name, key):
            account.skip(HIDDEN_MEMBERS, f"{tar}: {member.name}")
        elif extension in IMAGE_EXTENSIONS:
            if key in images:
                raise SourceError(f"{tar} has two images called {key}", remedy="give each image a name of its own")
            images[key] = member
        elif extension in (*_LABEL_EXTENSIONS, _CAPTIONS_EXTENSION):
            new, old = _Annotation(tar, key, extension, member), annotations.get(key)
            used, spare = (old, new) if old and old.extension in _LABEL_EXTENSIONS else (new, old)
            annotations[key] = used
            if spare:
                example = f"{tar}: {spare.member.name}"
                account.skip("labels or captions of images that have a label already", example)
        else:
            account.skip(why_no_image(extension), f"{tar}: {member.name}")
    if damage.problems:
        raise SourceError(damage.problems[0], remedy="fetch the tar again")
    account.add(damage)
    return images, annotations


def _require_pairs(tar: str, images: dict[str, TarMember], annotations: dict[str, _Annotation]) -> None:
    """Raises SourceError for an image without an annotation (UnlabelledError if no image of the tar has one), and for
    an annotation without an image."""
    bare = next((key for key in images if key not in annotations), None)
    if bare is not None:
        kind = SourceError if images.keys() & annotations.keys() else UnlabelledError
        remedy = "write its label, an integer, into KEY.cls, or captions into KEY.txt"
        raise kind(f"{tar}: {bare} has no .cls, .npy or .txt", remedy=remedy)
    used = {annotations[key].extension for key in images}
    lost = next((one for one in annotations.values() if one.key not in images and one.extension in used), None)
    if lost is not None:
        what = f"{tar}: {lost.key}.{lost.extension} has no image beside it"
        raise SourceError(what, remedy="put the image into the same tar, or take that file out")


def _read_annotation(annotation: _Annotation, classes: int | None) -> int | list[int] | tuple[str, ...]:
    """One label, the list of labels, or the captions."""
    tar, key, extension, member = annotation
    data, where = storage.read_bytes(tar, member.offset, member.size), f"{tar}: {key}.{extension}"
    if extension == "cls":
        return parse_label(data, where)
    if extension == _CAPTIONS_EXTENSION:
        return tuple(line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip())
    remedy = "write 0 or 1 for each class"
    try:
        marks = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # MemoryError for a header that claims petabytes
        raise SourceError(f"{where} cannot be read: {error}", remedy=remedy) from None
    if marks.shape != (classes or marks.size,) or not np.isin(marks, (0, 1)).all():
        raise SourceError(f"{where} is not a row of 0 and 1 for {classes or 'the'} classes", remedy=remedy)
    return [int(label) for label in np.flatnonzero(marks)]
