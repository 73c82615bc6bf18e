"""Count the files and folders of a labelled set that are not used, so that no layout hides another in silence.

Only the folder of the set and that of the split are listed, not the folders below them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dimefm.datasets.image_set import Records, labels_of
from dimefm.sources.account import Account
from dimefm.sources.class_folders import SPLIT_FOLDERS, SPLIT_NAMES, folder_names
from dimefm.sources.image_kinds import IMAGE, by_kind
from dimefm.sources.prompts import CLASSNAMES, CLIP_BENCHMARK_TEMPLATES, TEMPLATES
from dimefm.sources.walk_folder import files_in
from dimefm.system import storage

_TEXTS = frozenset({
    *(CLASSNAMES, TEMPLATES),
    *(CLIP_BENCHMARK_TEMPLATES, "nshards.txt", "dataset_type.txt"),  # CLIP_benchmark's own
})  # fmt: skip
_USED = {"webdataset": "tars", "parquet": "Parquet files", "folders": "class folders"}


def count_unused(records: Records, folder: str, place: str, split: str, *, own: bool = True) -> None:
    """Count in `records.account` what is not used of the set's `folder`, and of `place`, the folder of the files or
    class folders that are read. In an `own` set, splits that no command reads are counted too."""
    used, account = {file.path for file in records.files}, records.account
    beside = f" beside the {_USED[records.layout]}" if records.layout in _USED else ""
    for where in dict.fromkeys((folder, place)):
        files = [f for f in files_in(where, lambda name: name not in _TEXTS, account) if f.path not in used]
        folders: list[str] = []
        if where != place or records.layout != "folders":  # else these are class folders, which were all looked at
            folders = [storage.join(where, name) for name in folder_names(where)]
        if where == folder or _last_part(where) not in SPLIT_NAMES:  # where files of several splits may lie together
            names = [_last_part(path) for path in (*(file.path for file in files), *folders)]
            never_read = account if own else Account()
            if where == folder:  # of its folders, the one that is `place` or leads to it is read
                read = storage.join(where, place[len(where) :].lstrip("/").partition("/")[0])
                folders = [path for path in folders if path != read]
            files = [file for file in files if not _is_of_other_split(file.path, names, split, never_read)]
            folders = [path for path in folders if not _is_of_other_split(path, names, split, never_read)]
        for path in folders:
            account.skip(f"folders{beside}", path)
        for kind, those in by_kind(files, account).items():
            what = "images" if kind == IMAGE else f"{kind} files"
            for file in those:
                account.skip(f"{what}{beside}", file.path)


def note_empty_classes(records: Records, names: Sequence[str]) -> None:
    """Note in `records.account` how many of the classes `names` have no image."""
    occurring = {label for row in records.labels or [] for label in labels_of(row)}
    empty = [name for place, name in enumerate(names) if place not in occurring]
    if empty:
        such_as = f"{len(empty):,} of {len(names):,} classes have no image, such as {empty[0]}"
        records.account.problem(f"{such_as}: means per class are over the others")


def _last_part(path: str) -> str:
    return path.rpartition("/")[2]


def _is_of_other_split(path: str, names: Sequence[str], split: str, never_read: Account) -> bool:
    """Whether a file or folder, one of `names` in its folder, is of another split than `split`, which is read.

    It is counted in `never_read` if no command reads it. Commands read test and, for a probe, train, each under the
    first of its possible names: a folder `training` beside `train` is never read. Nor is val, which is counted with the
    test split alone, so that it is counted once.
    """

    def split_word(name: str) -> str | None:
        return next((word for word in SPLIT_NAMES if re.match(rf"{word}($|[-_.])", name)), None)

    name = _last_part(path)
    word = split_word(name)
    kind = next((kind for kind, words in SPLIT_FOLDERS.items() if word in words), None)
    if word is None or kind is None:
        return False
    if kind == split and name != word:  # a file of the split that is read, such as test-0.tar
        return False
    words_there = {split_word(one) for one in names}
    first = next(one for one in SPLIT_FOLDERS[kind] if one in words_there)
    if kind == split or (split == "test" and kind == "val") or word != first:
        never_read.skip("splits that are not used", path)
    return True
