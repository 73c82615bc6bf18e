"""Finding a set below a folder of many, or opening one of a user's own, and holding it against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache_schemas.evaluation import SetDefinition
from dimefm import storage
from dimefm.errors import SourceError
from dimefm.evaluation.definitions import class_folders, class_names, load_definitions, templates
from dimefm.evaluation.imageset import ImageSet, Records, array_of
from dimefm.evaluation.layouts import Reader, plain, read_folders, read_parquet, read_webdataset
from dimefm.evaluation.published_layouts import reader_of
from dimefm.sources.texts import CLASSNAMES, TEMPLATES

_COMMON: tuple[tuple[str, Reader], ...] = (("webdataset", read_webdataset), ("parquet", read_parquet))


def open_set(definition: SetDefinition, root: str, split: str, unpacked: str) -> ImageSet | None:
    """A split of a known set, from a folder below `root` called by its name or an alias; None where there is none.

    Sets that are kept as raw arrays are unpacked once, into a tar in the folder `unpacked`. Raises SourceError for what
    is there and cannot be read as the set.
    """
    for folder in _folders(definition, storage.absolute(root)):
        for layout, reader in _readers(definition, unpacked):
            if layout in definition.layouts and (records := reader(folder, split, definition)) is not None:
                return _as_defined(records, definition, split)
    return None


def open_folder(path: str, split: str = "test") -> ImageSet:
    """A set of a user's own: a folder with classnames.txt, templates.txt and images (see dimefm.evaluation.layouts), or
    one of tars or Parquet files of images with captions. Raises SourceError."""
    folder = storage.absolute(path)
    name = folder.rstrip("/").rpartition("/")[2]
    if not storage.is_url(folder) and not Path(folder).is_dir():
        raise SourceError(f"{path} is no folder", remedy="name a folder with classnames.txt and templates.txt")
    found = (reader(folder, split, None) for _, reader in _COMMON)
    records = next((one for one in found if one is not None), None)
    if records is None and not storage.is_url(folder):
        records = read_folders(folder, split, None)
    if records is None:
        records = Records(where=folder, layout="none", samples=[], files=[])
    records.require()
    if records.captions is not None:
        return _with_captions(records, name, split, ())
    for found_names, file in ((records.classnames, CLASSNAMES), (records.templates, TEMPLATES)):
        if found_names is None:
            remedy = f"a labelled set needs {CLASSNAMES} and {TEMPLATES}"
            raise SourceError(f"{storage.join(folder, file)} does not exist", remedy=remedy)
    names = records.classnames or []
    if records.names is not None:
        _map(records, names, names)
    multilabel = any(isinstance(one, list) for one in records.labels or [])
    return _with_classes(records, name, split, names, records.templates or [], multilabel, ())


def open_folders(paths: tuple[str, ...]) -> list[ImageSet]:
    """The sets at these paths. Raises SourceError where two folders have the same name: results go by name."""
    sets = [open_folder(path) for path in paths]
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two sets are called {name!r}", remedy="give folders with different names")
    return sets


def find_sets(names: tuple[str, ...], root: str | None) -> tuple[list[SetDefinition], dict[str, str]]:
    """Definitions by name or alias, or all of them; and of those with a folder below `root`, where that is. Raises
    SourceError for an unknown name."""
    known = load_definitions()
    aliases = {alias: d for d in known.values() for alias in d.aliases}
    for name in names:
        if name not in known and name not in aliases:
            raise SourceError(f"no set is called {name!r}", remedy="dimefm sets lists them")
    found = [known.get(name) or aliases[name] for name in names] or list(known.values())
    if root is None:
        return found, {}
    places = {d.name: next(_folders(d, storage.absolute(root)), "") for d in found}
    return found, {name: place for name, place in places.items() if place}


def _folders(definition: SetDefinition, root: str) -> Iterator[str]:
    for name in (definition.name, *definition.aliases):
        folder = storage.join(root, name)
        if storage.exists(folder) if storage.is_url(folder) else Path(folder).is_dir():
            yield folder


def _readers(definition: SetDefinition, unpacked: str) -> Iterator[tuple[str, Reader]]:
    yield from _COMMON
    if special := reader_of(definition.name, unpacked):
        yield "torchvision", special
        yield "original", special
    yield "folders", read_folders


def _as_defined(records: Records, definition: SetDefinition, split: str) -> ImageSet:
    records.require()
    images, wanted = len(records.samples), definition.splits.get(split)
    partial = [] if wanted in (None, images) else [f"{images} of {wanted} images"]
    if definition.task == "retrieval":
        if records.captions is None:
            what = f"{records.where} has labels, but {definition.title} is a set of captions"
            raise SourceError(what, remedy="look whether the folder holds another set")
        return _with_captions(records, definition.name, split, tuple(partial))
    if records.labels is None:
        what = f"{records.where} has captions, but {definition.title} is a set of classes"
        raise SourceError(what, remedy="look whether the folder holds another set")
    names, prompts = class_names(definition), templates(definition)
    given = records.names or records.classnames
    if given not in (None, names) and not _map(records, given or [], names, class_folders(definition)):
        strange = [name for name in given if plain(name) not in set(map(plain, names))]
        known = (
            f"{len(strange)} of {len(given)} are not in the definition, such as {strange[0]!r}"
            if strange
            else "their order"
        )
        records.notes += (f"class names and templates are those of the folder: {known}",)
        if len(given) != len(names):
            partial.append(f"{len(given)} of {len(names)} classes")
        names, prompts = given, records.templates or prompts
    found = _with_classes(
        records, definition.name, split, names, prompts, definition.task == "multilabel", tuple(partial)
    )
    occurring = int(found.classes.any(axis=0).sum()) if found.classes.ndim == 2 else len(np.unique(found.classes))
    if occurring < len(names):
        partial.append(f"{occurring} of {len(names)} classes occur")
    return ImageSet(**{**vars(found), "partial": tuple(partial)})


def _map(records: Records, given: list[str], names: list[str], also: list[str] | None = None) -> bool:
    """Make labels that count `given` count `names`, whichever way those are spelled. False where one is not among
    them, or two are the same: then nothing is changed. Raises SourceError for that where there is no other way."""
    places = {plain(name): place for place, name in [*enumerate(names), *enumerate(also or [])]}
    mapped = [places.get(plain(name)) for name in given]
    if None in mapped or len(set(mapped)) != len(mapped):
        if also is None:
            name = next((n for n, place in zip(given, mapped, strict=True) if place is None), given[0])
            what = f"{records.where}: {name!r} is not in {CLASSNAMES}, or is there twice"
            raise SourceError(what, remedy=f"name every class in {CLASSNAMES} as the labels do")
        return False
    labels = records.labels or []
    array_of(labels, len(given), not _single(records), records.where)  # each has a name
    table = [place for place in mapped if place is not None]
    records.labels = [[table[c] for c in row] if isinstance(row, list) else table[row] for row in labels]  # type: ignore[assignment]
    return True


def _single(records: Records) -> bool:
    return not any(isinstance(one, list) for one in records.labels or [])


def _with_classes(
    records: Records,
    name: str,
    split: str,
    names: list[str],
    prompts: list[str],
    multilabel: bool,
    partial: tuple[str, ...],
) -> ImageSet:
    if len(names) < 2:
        what = f"{records.where} has one class, {names[0]!r}: whatever the model says is right"
        raise SourceError(what, remedy="name all classes that an image could be of")
    labels = records.labels or []
    if multilabel and _single(records):
        what = f"{records.where} has one label an image, where {name} has several"
        raise SourceError(what, remedy="write 0 or 1 for every class into KEY.npy")
    if not multilabel and not _single(records):
        raise SourceError(f"{records.where} has several labels an image, where {name} has one", remedy="write KEY.cls")
    return ImageSet(
        name=name,
        split=split,
        where=records.where,
        layout=records.layout,
        samples=records.samples,
        files=records.files,
        classnames=tuple(names),
        templates=tuple(prompts),
        labels=array_of(labels, len(names), multilabel, records.where),
        partial=partial,
        notes=records.notes,
    )


def _with_captions(records: Records, name: str, split: str, partial: tuple[str, ...]) -> ImageSet:
    return ImageSet(
        name=name,
        split=split,
        where=records.where,
        layout=records.layout,
        samples=records.samples,
        files=records.files,
        captions=tuple(map(tuple, records.captions or [])),
        partial=partial,
        notes=records.notes,
    )
