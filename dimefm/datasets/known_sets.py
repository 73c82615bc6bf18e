"""Finding a known set below a folder of many, and holding it against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names, load_definitions, templates
from dimefm.datasets.image_set import ImageSet, Records
from dimefm.datasets.layouts import Reader, letters_and_digits, read_first, read_folders
from dimefm.datasets.own_sets import GENERAL_LAYOUTS, map_labels, with_captions, with_classes
from dimefm.datasets.published_layouts import reader_of
from dimefm.errors import SourceError
from dimefm.system import storage


def open_set(definition: SetDefinition, root: str, split: str, unpacked: str) -> ImageSet | None:
    """A split of a known set, from a folder below `root` called by its name or an alias; None where there is none.

    Sets that are kept as raw arrays are unpacked once, into a tar in the folder `unpacked`. Raises SourceError for what
    is there and cannot be read as the set, and for a folder without test images.
    """
    folder = None
    for folder in _folders(definition, storage.absolute(root)):
        readers = (one for one in _readers(definition, unpacked) if one[0] in definition.layouts)
        if found := read_first(readers, folder, split, definition):
            layout, records = found
            return _as_defined(replace(records, layout=layout), definition, split)
    if folder is not None and split == "test":
        what = f"{folder} has no test images of {definition.title} in a layout that is read"
        raise SourceError(what, remedy=f"those are: {', '.join(definition.layouts)}; see dimefm sets {definition.name}")
    return None


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
    if not storage.is_url(root) and not Path(root).is_dir():
        raise SourceError(f"{root} is no folder", remedy="give --data the folder that has one for each set")
    places = {d.name: next(_folders(d, storage.absolute(root)), "") for d in found}
    return found, {name: place for name, place in places.items() if place}


def _folders(definition: SetDefinition, root: str) -> Iterator[str]:
    for name in (definition.name, *definition.aliases):
        folder = storage.join(root, name)
        if storage.exists(folder) if storage.is_url(folder) else Path(folder).is_dir():
            yield folder


def _readers(definition: SetDefinition, unpacked: str) -> Iterator[tuple[str, Reader]]:
    yield from GENERAL_LAYOUTS
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
        return with_captions(records, definition.name, split, tuple(partial))
    if records.labels is None:
        what = f"{records.where} has captions, but {definition.title} is a set of classes"
        raise SourceError(what, remedy="look whether the folder holds another set")
    names, prompts = class_names(definition), templates(definition)
    given = records.names or records.classnames
    if given not in (None, names) and not map_labels(records, given or [], names, class_folders(definition)):
        spelled = set(map(letters_and_digits, [*names, *class_folders(definition)]))
        strange = [name for name in given if letters_and_digits(name) not in spelled]
        unknown = [f"{len(strange)} of {len(given)} are not in the definition, such as {name!r}" for name in strange]
        known = unknown[0] if unknown else "their order"
        partial.append(f"class names and templates are those of the folder ({known})")
        if len(given) != len(names):
            partial.append(f"{len(given)} of {len(names)} classes")
        names, prompts = given, records.templates or prompts
    found = with_classes(
        records, definition.name, split, names, prompts, definition.task == "multilabel", tuple(partial)
    )
    occurring = (
        int(found.class_labels.any(axis=0).sum())
        if found.class_labels.ndim == 2
        else len(np.unique(found.class_labels))
    )
    if occurring < len(names):
        partial.append(f"{occurring} of {len(names)} classes occur")
    return replace(found, partial=tuple(partial))
