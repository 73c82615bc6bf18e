"""What lies beside the images of a labelled set and is not used: counted, so that no layout hides another in silence.

Only the folder of the set and that of the split are listed: what is below other folders in them is not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dimefm.datasets.image_set import Records
from dimefm.sources.account import Account
from dimefm.sources.image_kinds import IMAGE, by_kind
from dimefm.sources.prompts import CLASSNAMES, TEMPLATES
from dimefm.sources.walk_folder import files_in, is_utf8, why_passed_over
from dimefm.system import storage

CLIP_BENCHMARK_TEMPLATES = "zeroshot_classification_templates.txt"
SPLIT_FOLDERS = {
    "train": ("train", "training", "Train", "Training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "Test", "Final_Test"),
}
SPLIT_NAMES = frozenset(name for names in SPLIT_FOLDERS.values() for name in names)

_TEXTS = (CLASSNAMES, TEMPLATES, CLIP_BENCHMARK_TEMPLATES, "nshards.txt", "dataset_type.txt")  # the last two: its own
_READ = {"webdataset": "tars", "parquet": "Parquet files", "folders": "class folders"}


def count_unused(records: Records, folder: str, place: str, split: str, *, own: bool = True) -> None:
    """Count in `records.account` what is not used of `folder`, that of the set, and of `place`, where its files or
    class folders are. Of a user's `own` set, splits too that are never read."""
    used, account = {file.path for file in records.files}, records.account
    beside = f" beside the {_READ[records.layout]}" if records.layout in _READ else ""
    for where in dict.fromkeys((folder, place)):
        found = files_in(where, lambda name: name not in _TEXTS, account)
        files = [file for file in found if file.path not in used]
        folders = _folders(where) if where != place or records.layout != "folders" else []  # those were looked at
        if where == folder or _last(where) not in SPLIT_NAMES:  # where it may be, files of several lie together
            read = place[len(where) :].lstrip("/").partition("/")[0] if where == folder else ""
            names, spare = [*(_last(file.path) for file in files), *folders], account if own else Account()
            files = [file for file in files if not _is_of_split(file.path, names, split, spare)]
            paths = [storage.join(where, name) for name in folders if name != read]
            folders = [_last(path) for path in paths if not _is_of_split(path, names, split, spare)]
        for name in folders:
            account.skip(f"folders{beside}", storage.join(where, name))
        for kind, those in by_kind(files, account).items():
            for file in those:
                account.skip(f"{'images' if kind == IMAGE else f'{kind} files'}{beside}", file.path)


def class_folders_in(base: str, account: Account) -> list[str]:
    """The names of the folders of classes in a local folder. A link back to it, or to one that it is in, is none."""
    above = {os.path.realpath(base), *map(str, Path(os.path.realpath(base)).parents)}
    found = []
    for name in _folders(base):
        if os.path.realpath(f"{base}/{name}") in above:
            account.skip("links back to a folder that they are in", f"{base}/{name}")
        else:
            found.append(name)
    return found


def note_empty_classes(records: Records, names: Sequence[str]) -> None:
    """Note in `records.account` the classes, by `names`, that no image is of."""
    occurring = {label for row in records.labels or [] for label in (row if isinstance(row, list) else (row,))}
    empty = [name for place, name in enumerate(names) if place not in occurring]
    if empty:
        such_as = f"{len(empty):,} of {len(names):,} classes have no image, such as {empty[0]}"
        records.account.problem(f"{such_as}: means per class are over the others")


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _folders(place: str) -> list[str]:
    """The names of the folders in a local one, without hidden ones, which `children` counts; none at a URL."""
    if storage.is_url(place):
        return []
    return sorted(
        p.name
        for p in Path(place).iterdir()
        if p.is_dir() and not why_passed_over(p.name, folder=True) and is_utf8(p.name)
    )


def _is_of_split(path: str, names: Sequence[str], split: str, account: Account) -> bool:
    """Whether something among `names` in the folder of a set is of another split than the one that is read. It is
    counted where it is never read: of each split but the test images, the first of its possible names is."""

    def word_of(one: str) -> str | None:
        return next((s for s in SPLIT_NAMES if re.match(rf"{s}($|[-_.])", one)), None)

    name = _last(path)
    word = word_of(name)
    kind = next((kind for kind, words in SPLIT_FOLDERS.items() if word in words), None)
    if word is None or kind is None or (kind == split and name != word):
        return False
    first = next(s for s in SPLIT_FOLDERS[kind] if s in map(word_of, names))
    if kind == split or (split == "test" and kind == "val") or word != first:
        account.skip("splits that are not used", path)
    return True
