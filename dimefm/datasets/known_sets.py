"""Known sets, those with a definition in sets/: find the folder of one below a root, and read it as it is defined.

A set of the user's own, which no definition describes, is opened by `own_sets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names, load_definitions, templates
from dimefm.datasets.folder_layout import read_folders
from dimefm.datasets.image_set import ImageSet, Records
from dimefm.datasets.layouts import Reader, letters_and_digits, read_first
from dimefm.datasets.own_sets import GENERAL_LAYOUTS, map_labels, with_captions, with_classes
from dimefm.datasets.published_layouts import reader_of
from dimefm.errors import SourceError
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean, did_you_mean_path


def open_set(definition: SetDefinition, root: str, split: str, unpacked: str) -> ImageSet | None:
    """A split of a known set, from the folder below `root` that has its name or an alias; None if there is none.

    A set that is published as raw arrays is unpacked once, into a tar below `unpacked`. Raises SourceError for a folder
    that cannot be read as this set, and for one without test images.
    """
    folder = None
    for folder in _folders(definition, storage.absolute(root)):
        readers = (pair for pair in _readers(definition, unpacked) if pair[0] in definition.layouts)
        if found := read_first(readers, folder, split, definition):
            layout, records = found
            return _as_defined(replace(records, layout=layout), definition, split)
    if folder is not None and split == "test":
        what = f"{folder} has no test images of {definition.title} in a layout that can be read"
        remedy = f"these can: {', '.join(definition.layouts)}; see dimefm sets {definition.name}"
        raise SourceError(what, remedy=remedy)
    return None


def find_sets(names: tuple[str, ...], root: str | None) -> tuple[list[SetDefinition], dict[str, str]]:
    """The definitions with these names or aliases (all if no name is given), and the folders of those that are below
    `root`, by name. Raises SourceError for an unknown name."""
    known = load_definitions()
    aliases = {alias: d for d in known.values() for alias in d.aliases}
    for name in names:
        if name not in known and name not in aliases:
            remedy = did_you_mean(name, known, "dimefm sets lists them")
            raise SourceError(f"no set is called {name!r}", remedy=remedy)
    definitions = [known.get(name) or aliases[name] for name in names] or list(known.values())
    if root is None:
        return definitions, {}
    if not storage.is_url(root) and not Path(root).is_dir():
        remedy = did_you_mean_path(root, "give --data the folder that holds a folder for each set")
        raise SourceError(f"{root} is no folder", remedy=remedy)
    folders = {d.name: next(_folders(d, storage.absolute(root)), "") for d in definitions}
    return definitions, {name: folder for name, folder in folders.items() if folder}


def _folders(definition: SetDefinition, root: str) -> Iterator[str]:
    """The folders below `root` that have the set's name or one of its aliases."""
    for name in (definition.name, *definition.aliases):
        folder = storage.join(root, name)
        if storage.exists(folder) if storage.is_url(folder) else Path(folder).is_dir():
            yield folder


def _readers(definition: SetDefinition, unpacked: str) -> Iterator[tuple[str, Reader]]:
    """Layouts and their readers, in the order in which they are tried."""
    yield from GENERAL_LAYOUTS
    if special := reader_of(definition.name, unpacked):
        yield "torchvision", special
        yield "original", special
    yield "folders", read_folders


def _as_defined(records: Records, definition: SetDefinition, split: str) -> ImageSet:
    """The image set of `records`, with the labels, classes and templates of the definition as far as they agree.

    Where the folder names classes that the definition does not have, the set is measured with the folder's names, and
    `partial` says so. Raises SourceError for labels instead of captions and the reverse.
    """
    records.require()
    _require_task(records, definition)
    found, published = len(records.samples), definition.splits.get(split)
    partial = [] if published in (None, found) else [f"{found} of {published} images"]
    if definition.task == "retrieval":
        return with_captions(records, definition.name, split, tuple(partial))
    names, prompts = class_names(definition), templates(definition)
    counted = records.names or records.classnames or names  # the names that the labels on disk count
    if counted != names and not map_labels(records, counted, names, class_folders(definition)):
        partial += _class_differences(counted, definition)
        names, prompts = counted, records.templates or prompts
    images = with_classes(records, definition.name, split, names, prompts, definition.task == "multilabel", ())
    labels = images.class_labels
    occurring = int(labels.any(axis=0).sum()) if labels.ndim == 2 else len(np.unique(labels))
    if occurring < len(names):
        partial.append(f"{occurring} of {len(names)} classes occur")
    return replace(images, partial=tuple(partial))


def _require_task(records: Records, definition: SetDefinition) -> None:
    """Raises SourceError for a folder with labels where the set has captions, and the reverse."""
    found, wanted = ("labels", "captions") if definition.task == "retrieval" else ("captions", "classes")
    if (records.captions if definition.task == "retrieval" else records.labels) is None:
        what = f"{records.where} has {found}, but {definition.title} is a set of {wanted}"
        raise SourceError(what, remedy="check whether the folder holds another set")


def _class_differences(counted: list[str], definition: SetDefinition) -> list[str]:
    """How the class names of a folder differ from those of the definition. A result keeps these words, and
    `--skip-existing` compares them: they do not change."""
    spelled = set(map(letters_and_digits, [*class_names(definition), *class_folders(definition)]))
    strange = [name for name in counted if letters_and_digits(name) not in spelled]
    how = "their order"
    if strange:
        how = f"{len(strange)} of {len(counted)} are not in the definition, such as {strange[0]!r}"
    found = [f"class names and templates are those of the folder ({how})"]
    if len(counted) != definition.class_count:
        found.append(f"{len(counted)} of {definition.class_count} classes")
    return found
