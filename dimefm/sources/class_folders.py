"""Class folders of a labelled set: one folder of images per class, below the folder of a split or in the set's own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.file_names import extension_of
from dimefm.sources.image_kinds import IMAGE_EXTENSIONS
from dimefm.sources.walk_folder import is_utf8, why_passed_over
from dimefm.system import storage

SPLIT_FOLDERS = {  # what the folder or the files of a split may be called
    "train": ("train", "training", "Train", "Training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "Test", "Final_Test"),
}
SPLIT_NAMES = frozenset(name for names in SPLIT_FOLDERS.values() for name in names)
_NUMBER = re.compile(r"n?\d+")  # also an id of WordNet, as ImageNet's folders have


def class_folders_in(base: str, account: Account) -> list[str]:
    """The names of the class folders in a local folder. A link to a folder that it is in is counted in `account`."""
    above = {os.path.realpath(base), *map(str, Path(os.path.realpath(base)).parents)}
    found = []
    for name in folder_names(base):
        if os.path.realpath(f"{base}/{name}") in above:
            account.skip("links back to a folder that they are in", f"{base}/{name}")
        else:
            found.append(name)
    return found


def folder_names(place: str) -> list[str]:
    """The names of the folders in a local folder, without hidden ones, which `files_in` counts; none at a URL."""
    if storage.is_url(place) or not Path(place).is_dir():
        return []
    return sorted(
        p.name
        for p in Path(place).iterdir()
        if p.is_dir() and not why_passed_over(p.name, folder=True) and is_utf8(p.name)
    )


def folders_of_classes(root: str) -> dict[str, str]:
    """The classes of a set that has class folders and no list of class names: a folder of each class, by its name.

    The classes are those of the test split and of the train split together, so that both have the same labels.
    """
    tests = next((name for name in SPLIT_FOLDERS["test"] + SPLIT_FOLDERS["val"] if Path(root, name).is_dir()), None)
    train = next((name for name in SPLIT_FOLDERS["train"] if Path(root, name).is_dir()), None)
    bases = [f"{root}/{name}" for name in (train, tests) if name] or [root]
    found = {name: f"{base}/{name}" for base in bases for name in class_folders_in(base, Account())}
    return dict(sorted(found.items()))


def names_of_folders(root: str, folders: Sequence[str]) -> list[str]:
    """The class names that class folders stand for: `_` and `-` are spaces. Raises SourceError for folders that are
    called by numbers or by ids of WordNet, which name nothing, and for two that would have one name."""
    remedy = "write classnames.txt: one class name per line, in the order of the labels"
    if bare := [name for name in folders if _NUMBER.fullmatch(name)]:
        what = f"{root} has no classnames.txt, and its class folders are numbers, such as {bare[0]}"
        raise SourceError(what, remedy=remedy)
    names = [" ".join(re.sub("[_-]", " ", name).split()) or name for name in folders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        those = [folder for folder, name in zip(folders, names, strict=True) if name == twice]
        what = f"{root}: the class folders {' and '.join(those)} would have one class name, {twice!r}"
        raise SourceError(what, remedy=f"rename one, or {remedy}")
    return names


def is_image_folder(root: str, files: Sequence[SourceFile]) -> bool:
    """Whether a local folder, whose files at any depth are `files`, is a set of class folders: two or more, each with
    an image, named by words, and no image beside them."""
    if storage.is_url(root):
        return False
    images = [file.path[len(root) :].strip("/").split("/") for file in files if _is_image(file)]
    classes = folders_of_classes(root)
    if len(classes) < 2 or any(len(parts) == 1 for parts in images) or any(map(_NUMBER.fullmatch, classes)):
        return False
    return classes.keys() <= {part for parts in images for part in parts[:-1][:2]}  # below a split, or in the root


def _is_image(file: SourceFile) -> bool:
    return extension_of(file.path) in IMAGE_EXTENSIONS
