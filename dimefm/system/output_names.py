"""Looks at the place of an output before any work: its name, and whether something else is there.

`.zarr` on an index, or `.json` on a run, would mislead whoever finds it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

from dimefm.errors import DimefmError, OutputExistsError
from dimefm.system import storage

_WRITTEN = {".zarr": "a store or pairs", ".index": "an index", ".selection": "a selection"}
_FILES = frozenset(
    (".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".csv", ".tsv", ".parquet", ".tar", ".zip", ".gz", ".pt",
     ".pth", ".bin", ".safetensors", ".npy", ".npz", ".idx", ".faiss", ".png", ".jpg", ".jpeg")
)  # fmt: skip


def require_name(out: str, what: str, usual: str = "") -> None:
    """Raises OutputExistsError where a file is at `out`, and DimefmError for a new output whose name ends as that of
    another kind does. `what` is what is written, such as "an index", and `usual` how its name usually ends. Any other
    ending is fine, and so is none."""
    if not storage.is_url(out) and Path(storage.absolute(out)).is_file():
        raise OutputExistsError(f"{out} exists and is a file", remedy="give another --out")
    suffix = PurePosixPath(out.rstrip("/")).suffix.lower()
    if suffix == usual or not (suffix in _WRITTEN or suffix in _FILES):
        return
    with suppress(OSError):  # of storage that does not answer
        if storage.exists(storage.absolute(out)):
            return  # what is there already is looked at by its content
    kind = _WRITTEN.get(suffix, "a file")
    remedy = f"give a name that ends with {usual}, or without a suffix" if usual else "leave the suffix out"
    raise DimefmError(f"{out} would be {what}, but {suffix} is the suffix of {kind}", remedy=remedy)


def require_place(out: str, mark: str) -> None:
    """Raises OutputExistsError where a folder is at `out` that holds something, but not the file `mark`, which every
    folder of the kind that is written holds."""
    names = storage.listing(out)
    if names and mark not in names:
        raise OutputExistsError(f"{out} exists and holds something else, {names[0]!r}", remedy="give another --out")
