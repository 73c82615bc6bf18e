"""Flush local files and folders to the disk, so that what is written after them is never there without them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dimefm.system.storage.places import is_url

UNFINISHED = ".unfinished"
"""How the names of files and folders end that are being written."""


def make_folder(path: str) -> None:
    """Make a local folder and its missing parents, and flush their names to the disk: without that, a file that is
    flushed could be lost together with its folder. Raises OSError."""
    folder, new = Path(path), list[Path]()
    while not folder.exists():
        new.append(folder)
        folder = folder.parent
    Path(path).mkdir(parents=True, exist_ok=True)
    for made in new:
        sync(str(made.parent))


def missing(path: str) -> list[Path]:
    """A local folder and those around it, as far as they do not exist, the inner ones first."""
    return [place for place in (Path(path), *Path(path).parents) if not place.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def flush(path: str) -> None:
    """Flush a local file or folder and its name to the disk, so that a commit written after it is never there without
    it. Does nothing for a URL."""
    if not is_url(path):
        sync(path)
        sync(str(Path(path).parent))


def flush_tree(folder: str) -> None:
    """`flush` of a local folder and of everything below it."""
    if not is_url(folder):
        for place in [*Path(folder).rglob("*"), Path(folder), Path(folder).parent]:
            sync(str(place))


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
