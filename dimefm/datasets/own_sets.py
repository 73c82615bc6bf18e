"""Opening a set of a user's own, and making an image set of what a layout's reader found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dimefm.datasets.image_set import ImageSet, Records, label_array
from dimefm.datasets.layouts import Reader, name_lookup, read_first, read_folders, read_parquet, read_webdataset
from dimefm.datasets.unused_files import count_unused, note_empty_classes
from dimefm.errors import SourceError
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.sources.prompts import CLASSNAMES, TEMPLATES
from dimefm.system import storage

GENERAL_LAYOUTS: tuple[tuple[str, Reader], ...] = (("webdataset", read_webdataset), ("parquet", read_parquet))
"""Layouts that any set may have, by name, in the order in which they are looked for."""


def open_folder(path: str, split: str = "test") -> ImageSet:
    """A set of a user's own: a folder with classnames.txt, templates.txt and images (see dimefm.datasets.layouts), or
    one of tars or Parquet files of images with captions. Raises SourceError."""
    found = find_folder(path, split)
    if found is None and storage.is_url(path):
        what = f"{path} holds no .tar and no .parquet of the {split} split"
        raise SourceError(what, remedy="class folders must be local; pack them into tars")
    if found is None:
        nothing = Records(where=storage.absolute(path), layout="none", samples=[], files=[])
        count_unused(nothing, nothing.where, nothing.where, split)
        nothing.require()
    assert found is not None
    return found


def find_folder(path: str, split: str) -> ImageSet | None:
    """As `open_folder`, but None where the folder has no such split."""
    folder, name = storage.absolute(path), set_name(path)
    if not storage.is_url(folder) and not Path(folder).is_dir():
        raise SourceError(f"{path} is no folder", remedy="name a folder with classnames.txt and templates.txt")
    found = read_first((*GENERAL_LAYOUTS, ("folders", read_folders)), folder, split, None)
    if found is None:
        return None
    records = found[1]
    records.require()
    if records.captions is not None:
        return with_captions(records, name, split, ())
    for found_names, file in ((records.classnames, CLASSNAMES), (records.templates, TEMPLATES)):
        if found_names is None:
            remedy = f"a labelled set needs {CLASSNAMES} and {TEMPLATES}"
            raise SourceError(f"{storage.join(folder, file)} does not exist", remedy=remedy)
    names = records.classnames or []
    if records.names is not None:
        map_labels(records, records.names, names)
    multilabel = any(isinstance(one, list) for one in records.labels or [])
    note_empty_classes(records, names)
    return with_classes(records, name, split, names, records.templates or [], multilabel, ())


def set_name(path: str) -> str:
    """What the set in this folder is called."""
    return storage.absolute(path).rstrip("/").rpartition("/")[2]


def open_folders(paths: tuple[str, ...]) -> list[ImageSet]:
    """The sets at these paths. Raises SourceError where two folders have the same name: results go by name."""
    sets = [open_folder(path) for path in paths]
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two sets are called {name!r}", remedy="give folders with different names")
    return sets


def map_labels(records: Records, given: list[str], names: list[str], also: list[str] | None = None) -> bool:
    """Make labels that count `given` count `names`, whichever way those are spelled. False where one is not among
    them, or two are the same: then nothing is changed. Raises SourceError for that where there is no other way."""
    mapped = list(map(name_lookup([*enumerate(names), *enumerate(also or [])]), given))
    if None in mapped or len(set(mapped)) != len(mapped):
        if also is None:
            name = next((n for n, place in zip(given, mapped, strict=True) if place is None), given[0])
            what = f"{records.where}: {name!r} is not in {CLASSNAMES}, or is there twice"
            raise SourceError(what, remedy=f"name every class in {CLASSNAMES} as the labels do")
        return False
    labels = records.labels or []
    label_array(records, len(given), not _single(records))  # each has a name
    table = [place for place in mapped if place is not None]
    records.labels = [[table[c] for c in row] if isinstance(row, list) else table[row] for row in labels]  # type: ignore[assignment]
    return True


def _single(records: Records) -> bool:
    return not any(isinstance(one, list) for one in records.labels or [])


def with_classes(
    records: Records,
    name: str,
    split: str,
    names: list[str],
    prompts: list[str],
    multilabel: bool,
    partial: tuple[str, ...],
) -> ImageSet:
    """A set of these class names and templates. Raises SourceError where the labels are not of its kind."""
    if len(names) < 2:
        what = f"{records.where} has one class, {names[0]!r}: whatever the model says is right"
        raise SourceError(what, remedy="name all classes that an image could be of")
    if multilabel and _single(records):
        what = f"{records.where} has one label an image, where {name} has several"
        raise SourceError(what, remedy="write 0 or 1 for every class into KEY.npy")
    if not multilabel and not _single(records):
        raise SourceError(f"{records.where} has several labels an image, where {name} has one", remedy="write KEY.cls")
    said = {"classnames": tuple(names), "templates": tuple(prompts)}
    return _image_set(records, name, split, partial, labels=label_array(records, len(names), multilabel), **said)


def with_captions(records: Records, name: str, split: str, partial: tuple[str, ...]) -> ImageSet:
    """A set of images with captions."""
    return _image_set(records, name, split, partial, captions=tuple(map(tuple, records.captions or [])))


def _image_set(records: Records, name: str, split: str, partial: tuple[str, ...], **said: Any) -> ImageSet:
    return ImageSet(
        name=name,
        split=split,
        where=records.where,
        layout=records.layout,
        samples=records.samples,
        files=records.files,
        partial=partial,
        notes=tuple(first_lines([*records.account.problems, *map(describe_skipped, records.account.skipped())])),
        **said,
    )
