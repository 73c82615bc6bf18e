"""How labelled sets are kept on disk, and what the readers of all layouts share. A reader gives `Records`.

    SET/test/0.tar            as CLIP_benchmark publishes them, or SET/test-00000.tar, or SET/*.tar: key.jpg beside
                              key.cls (a label), key.npy (0 or 1 for every class) or key.txt (captions, one per line).
                              Read by webdataset_layout
    SET/test/*.parquet        or SET/test-*.parquet, SET/data/test-*.parquet, SET/*.parquet: a column of images and one
                              of labels or captions. Read by parquet_layout
    SET/test/CLASS/*.jpg      or SET/CLASS/*.jpg. Read by folder_layout

A folder without splits is the test split. Layouts of a single set are read by published_layouts and raw_arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from cache_schemas.evaluation import SetDefinition
from cache_schemas.plan import SourceFile
from dimefm.datasets.image_set import Records
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.class_folders import SPLIT_FOLDERS
from dimefm.sources.prompts import CLASSNAMES, CLIP_BENCHMARK_TEMPLATES, TEMPLATES, read_classnames, read_templates
from dimefm.sources.walk_folder import files_in
from dimefm.system import storage

Reader = Callable[[str, str, SetDefinition | None], Records | None]
"""Takes a set's folder, a split, and the definition of a known set. Gives None for a folder of another layout."""


class UnlabelledError(SourceError):
    """Tars or tables without any label. They may lie beside the set, which is then kept in another layout."""


def read_first(
    readers: Iterable[tuple[str, Reader]], folder: str, split: str, definition: SetDefinition | None
) -> tuple[str, Records] | None:
    """The name of the first layout that the folder has, and its records; None if it has none of these.

    Tars and tables without labels are noted and passed over if the folder has another layout. If it has none, they are
    an error.
    """
    unlabelled: UnlabelledError | None = None
    for layout, reader in readers:
        try:
            records = reader(folder, split, definition)
        except UnlabelledError as error:
            unlabelled = unlabelled or error
            continue
        except SourceError:
            if unlabelled:
                raise unlabelled from None
            raise
        if records is not None:
            if unlabelled:
                records.account.problem(f"not used: {unlabelled.what}")
            return layout, records
    if unlabelled:
        raise unlabelled
    return None


def split_folder_names(split: str, definition: SetDefinition | None) -> tuple[str, ...]:
    """Folder names to try for a split. A set without a validation split may call its test split `val`; for ImageNet,
    whose own test images have no labels, that is tried first."""
    if split != "test" or (definition is not None and "val" in definition.splits):
        return SPLIT_FOLDERS[split]
    if definition is not None and definition.suite == "imagenet":
        return SPLIT_FOLDERS["val"] + SPLIT_FOLDERS["test"]
    return SPLIT_FOLDERS["test"] + SPLIT_FOLDERS["val"]


def split_files(folder: str, split: str, suffix: str, definition: SetDefinition | None) -> list[SourceFile]:
    """The files of a split that end in `suffix`, from the first place that has some: the split's own folder, or files
    that begin with its name in the set's folder or in data/. The test split may also be files that name no split."""

    def named_files(place: str, begin: tuple[str, ...] = ("",), avoid: tuple[str, ...] = ()) -> list[SourceFile]:
        def wanted(name: str) -> bool:
            return name.lower().endswith(suffix) and name.startswith(begin) and not name.startswith(avoid)

        if not storage.is_url(place) and not Path(place).is_dir():
            return []
        return files_in(place, wanted, Account())

    for name in split_folder_names(split, definition):
        if found := named_files(storage.join(folder, name)):
            return found
        for place in (folder, storage.join(folder, "data")):
            if found := named_files(place, begin=_prefixes(name)):
                return found
    others = SPLIT_FOLDERS["train"] + SPLIT_FOLDERS["val"]
    return named_files(folder, avoid=_prefixes(*others)) if split == "test" else []


def _prefixes(*names: str) -> tuple[str, ...]:
    """How a file name may begin that belongs to a split of this name."""
    return tuple(f"{name}{mark}" for name in names for mark in "-_.")


def add_class_texts(records: Records, folder: str) -> Records:
    """`records` with the class names and templates in the files of the folder, if labels need them."""
    if records.captions is not None:
        return records
    files = set(storage.listing(folder))
    if CLASSNAMES in files and (records.layout != "folders" or records.names is None):
        records.classnames = read_classnames(folder)
    for name in (TEMPLATES, CLIP_BENCHMARK_TEMPLATES):
        if name in files:
            records.templates = read_templates(folder, name)
            break
    return records


def letters_and_digits(name: str) -> str:
    """A name by its letters and digits alone, in one case: ``F/A-18`` and ``fa_18`` are the same."""
    return "".join(c for c in name.casefold() if c.isalnum()) or name


def name_lookup(spellings: Iterable[tuple[int, str]]) -> Callable[[str], int | None]:
    """A function from a class name to its label, given labels and how each may be spelled. The exact spelling comes
    first, then `letters_and_digits`. It gives None for a name that no label has, or several."""
    exact: dict[str, set[int]] = {}
    loose: dict[str, set[int]] = {}
    for label, name in spellings:
        exact.setdefault(name, set()).add(label)
        loose.setdefault(letters_and_digits(name), set()).add(label)

    def label_of(name: str) -> int | None:
        labels = exact.get(name) or loose.get(letters_and_digits(name)) or set()
        return next(iter(labels)) if len(labels) == 1 else None

    return label_of


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key that puts 2.tar before 10.tar."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path)]
