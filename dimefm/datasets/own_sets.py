"""Own sets: folders of the user's, described by classnames.txt and templates.txt beside the images, or by no more than
the names of class folders.

Also what own sets share with known ones (`known_sets`): making an ImageSet of what the reader of a layout found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dimefm.datasets.definitions import load_definitions
from dimefm.datasets.folder_layout import read_folders
from dimefm.datasets.image_set import ImageSet, Records, label_array, relabel
from dimefm.datasets.layouts import Reader, name_lookup, read_first
from dimefm.datasets.parquet_layout import read_parquet
from dimefm.datasets.unused_files import count_unused, note_empty_classes
from dimefm.datasets.webdataset_layout import read_webdataset
from dimefm.errors import SourceError
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.sources.prompts import CLASSNAMES, NEEDED, class_texts
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path, near_names

GENERAL_LAYOUTS: tuple[tuple[str, Reader], ...] = (("webdataset", read_webdataset), ("parquet", read_parquet))
"""The layouts that any set may have, in the order in which they are tried."""


def open_folder(path: str, split: str = "test") -> ImageSet:
    """Open an own set: a folder of images with classnames.txt and templates.txt, of class folders alone, or of tars or
    Parquet files of images with captions (see datasets.layouts). What was made up in place of the two files stands in
    the notes. Raises SourceError."""
    images = find_folder(path, split)
    if images is None and storage.is_url(path):
        what = f"{path} holds no .tar and no .parquet of the {split} split"
        raise SourceError(what, remedy="class folders must be local; pack them into tars")
    if images is None:
        nothing = Records(where=storage.absolute(path), layout="none", samples=[], files=[])
        count_unused(nothing, nothing.where, nothing.where, split)
        nothing.require()
    assert images is not None
    return images


def find_folder(path: str, split: str) -> ImageSet | None:
    """Like `open_folder`, but gives None where the folder has no such split."""
    folder, name = storage.absolute(path), set_name(path)
    require_folder(path)
    found = read_first((*GENERAL_LAYOUTS, ("folders", read_folders)), folder, split, None)
    if found is None:
        return None
    records = found[1]
    records.require()
    if records.captions is not None:
        return with_captions(records, name, split, ())
    if records.classnames is None and records.layout != "folders":
        raise SourceError(f"{storage.join(folder, CLASSNAMES)} does not exist", remedy=NEEDED)
    names, prompts, made_up = class_texts(folder)
    for note in made_up:
        records.account.problem(note)
    if records.names is not None:
        map_labels(records, records.names, names)
    note_empty_classes(records, names)
    return with_classes(records, name, split, names, prompts, _has_several(records), ())


def require_folder(path: str) -> None:
    """Raises SourceError for a local path that is no folder."""
    folder = storage.absolute(path)
    if not storage.is_url(folder) and not Path(folder).is_dir():
        raise SourceError(f"{path} is no folder", remedy=_meant(path))


def _meant(path: str) -> str:
    """A remedy for a folder that does not exist: the known set of that name, or else one beside it with a like name."""
    known = load_definitions()
    if path not in known and (near := did_you_mean_path(path)):
        return near
    names = near_names(path, known, 1)
    of_known = [f"; or, of the known set: dimefm evaluate MODEL --sets {name} --data ROOT" for name in names]
    return "give the folder that has its images" + "".join(of_known)


def set_name(path: str) -> str:
    """The name of the own set in this folder: that of the folder."""
    return storage.absolute(path).rstrip("/").rpartition("/")[2]


def open_folders(paths: tuple[str, ...]) -> list[ImageSet]:
    """Open the own sets at these paths. Raises SourceError for two folders of one name, since results go by name."""
    sets = [open_folder(path) for path in paths]
    names = [images.name for images in sets]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two sets are called {name!r}", remedy="give folders with different names")
    return sets


def map_labels(records: Records, counted: list[str], names: list[str], aliases: list[str] | None = None) -> bool:
    """Make the labels, which count the names `counted`, count `names` instead, however either is spelled.

    `aliases` are other names of the same classes. With them, a name of `counted` that is not found or found twice
    changes nothing, and False is returned. Without them it raises SourceError.
    """
    label_of = name_lookup([*enumerate(names), *enumerate(aliases or [])])
    labels = [label for name in counted if (label := label_of(name)) is not None]
    if len(labels) < len(counted) or len(set(labels)) < len(labels):
        if aliases is not None:
            return False
        name = next((name for name in counted if label_of(name) is None), counted[0])
        what = f"{records.where}: {name!r} is not in {CLASSNAMES}, or is in it twice"
        raise SourceError(what, remedy=f"name every class in {CLASSNAMES} as the labels do")
    label_array(records, len(counted), _has_several(records))  # raises SourceError for a label that counts no name
    records.labels = relabel(records.labels or [], labels)
    return True


def _has_several(records: Records) -> bool:
    """Whether an image may have several labels."""
    return any(isinstance(one, list) for one in records.labels or [])


def with_classes(
    records: Records,
    name: str,
    split: str,
    names: list[str],
    prompts: list[str],
    multilabel: bool,
    partial: tuple[str, ...],
) -> ImageSet:
    """A set with these class names and templates. Raises SourceError for a single class, and where images have several
    labels although the set has one for each, or the reverse."""
    if len(names) < 2:
        what = f"{records.where} has one class, {names[0]!r}: whatever the model says is right"
        raise SourceError(what, remedy="name all classes that an image could be of")
    if multilabel and not _has_several(records):
        what = f"{records.where} has one label per image, where {name} has several"
        raise SourceError(what, remedy="write 0 or 1 for every class into KEY.npy")
    if not multilabel and _has_several(records):
        what = f"{records.where} has several labels per image, where {name} has one"
        raise SourceError(what, remedy="write the label into KEY.cls")
    labels = label_array(records, len(names), multilabel)
    texts = {"classnames": tuple(names), "templates": tuple(prompts)}
    return _image_set(records, name, split, partial, labels=labels, **texts)


def with_captions(records: Records, name: str, split: str, partial: tuple[str, ...]) -> ImageSet:
    """A set of images with captions."""
    return _image_set(records, name, split, partial, captions=tuple(map(tuple, records.captions or [])))


def _image_set(records: Records, name: str, split: str, partial: tuple[str, ...], **annotations: Any) -> ImageSet:
    return ImageSet(
        name=name,
        split=split,
        where=records.where,
        layout=records.layout,
        samples=records.samples,
        files=records.files,
        partial=partial,
        notes=tuple(first_lines([*records.account.problems, *map(describe_skipped, records.account.skipped())])),
        **annotations,
    )
