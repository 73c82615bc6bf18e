"""Flush local files and folders to the disk, so that what is written after them is never there without them."""

from __future__ import annotations

import os
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
