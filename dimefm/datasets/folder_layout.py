"""The layout of class folders: one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names
from dimefm.datasets.image_set import Records
from dimefm.datasets.layouts import add_class_texts, name_lookup, split_folder_names
from dimefm.datasets.unused_files import count_unused
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, file_key
from dimefm.sources.class_folders import SPLIT_NAMES, class_folders_in, folders_of_classes
from dimefm.sources.image_sources import ImageFolder
from dimefm.sources.prompts import CLASSNAMES, has_classnames, read_classnames
from dimefm.system import storage

_WITHOUT_SPLITS = ("objectnet-1.0/images",)
"""Where a set without splits may have its class folders, if not directly in its own folder."""


def read_folders(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """One folder of images for each class. Raises SourceError for a folder that is no class.

    There is one exception: where every class of a known set has its folder, further folders are left out and counted
    (ObjectNet has 313 classes, of which 113 are scored).
    """
    base = _folder_of_classes(folder, split, definition)
    if base is None:
        return None
    account = Account()
    names = class_folders_in(base, account)
    label_of = _labels_of_folders(names, folder, definition)
    if not names or (definition is not None and not label_of):
        return None
    _leave_out_others(base, [name for name in names if name not in label_of], len(label_of), definition, account)
    records = Records(where=base, layout="folders", samples=[], files=[], account=account)
    labels: list[int] = []
    first_folder: dict[int, str] = {}
    for name, label in label_of.items():
        if (first := first_folder.setdefault(label, name)) != name:
            account.problem(f"the folders {first} and {name} of {base} are taken for the same class")
        files = ImageFolder(storage.join(base, name), account).files()
        records.files += files
        records.samples += [ImageSample(file_key(file.path, base), file.path, 0, file.size) for file in files]
        labels += [label] * len(files)
    records.labels = labels
    count_unused(records, folder, base, split, own=definition is None)
    if definition is not None:
        records.names = class_names(definition)
    return add_class_texts(records, folder)


def _folder_of_classes(folder: str, split: str, definition: SetDefinition | None) -> str | None:
    """The folder that holds the class folders of a split; None if there is none. For the test split it may be
    the set's own folder, if that has no folder of any split."""
    if storage.is_url(folder):
        return None
    for name in split_folder_names(split, definition):
        if Path(folder, name).is_dir():
            return f"{folder}/{name}"
    if split != "test" or any(Path(folder, name).is_dir() for name in SPLIT_NAMES):
        return None
    return next((f"{folder}/{place}" for place in _WITHOUT_SPLITS if Path(folder, place).is_dir()), folder)


def _labels_of_folders(names: list[str], folder: str, definition: SetDefinition | None) -> dict[str, int]:
    """The label of each folder that is a class. Folders are called as the classes, or all by their labels."""
    if definition is None:
        spellings = [*enumerate(read_classnames(folder) if has_classnames(folder) else folders_of_classes(folder))]
    else:
        spellings = [*enumerate(class_names(definition)), *enumerate(class_folders(definition))]
    look_up = name_lookup(spellings)
    labels = {name: label for name in names if (label := look_up(name)) is not None}
    if not labels and all(name.isdigit() for name in names):
        labels = {name: int(name) for name in names}
    return labels


def _leave_out_others(
    base: str, others: list[str], classes_found: int, definition: SetDefinition | None, account: Account
) -> None:
    """Count the folders that are no class if every class of a known set was found; else raise SourceError for them."""
    if not others:
        return
    if definition is not None and classes_found == definition.class_count:
        account.skip("folders that are no class of the set", others[0], len(others))
        return
    owner, remedy = CLASSNAMES, f"name each folder as its line in {CLASSNAMES}"
    if definition is not None:
        owner, remedy = definition.title, f"see dimefm sets {definition.name}"
    raise SourceError(f"{base}/{others[0]} is not a class of {owner}", remedy=remedy)
