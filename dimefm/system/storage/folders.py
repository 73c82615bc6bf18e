"""Folders: what is in them, published whole, cleaned up, removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from dimefm.system.stopping import holding
from dimefm.system.storage.durable import UNFINISHED, flush_tree, make_folder, missing, remove_empty, sync
from dimefm.system.storage.failures import asking, writing_to
from dimefm.system.storage.files import exists
from dimefm.system.storage.places import fresh, is_url

_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")  # the name of a file that zarr-python is writing


def listing(path: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; empty where there is no such folder. Leaves out hidden ones,
    and what zarr-python has not finished. Raises OSError where the folder cannot be listed."""
    try:
        if not is_url(path):
            names = [entry.name for entry in os.scandir(path)]
        else:
            fs, inner = fresh(path)
            with asking(path):
                names = [name.rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # An empty name is the mark that S3 consoles put into a folder they make.
    return sorted(name for name in names if name and not name.startswith(".") and not _PARTIAL.fullmatch(name))


def tree(folder: str) -> set[str]:
    """The files below a folder, as paths within it; without hidden ones, such as a lock. Raises OSError."""
    if is_url(folder):
        fs, inner = fresh(folder)
        found = [info["name"][len(inner.rstrip("/")) + 1 :] for info in walk(fs, inner)]
    else:
        found = [os.path.relpath(f"{root}/{name}", folder) for root, name in walk_local(folder)]
    return {name for name in found if not name.rpartition("/")[2].startswith(".")}


def walk_local(folder: str) -> Iterator[tuple[str, str]]:
    """Every file below a local folder, as its own folder and its name; nothing where there is no such folder.

    Raises OSError for a folder that cannot be listed, except for the lost+found of a file system, which is root's.
    """

    def failed(error: OSError) -> None:
        name = str(error.filename)
        absent = isinstance(error, FileNotFoundError) and name == folder
        if not absent and not (isinstance(error, PermissionError) and name.endswith("/lost+found")):
            raise error

    for root, _, names in os.walk(folder, onerror=failed):
        yield from ((root, name) for name in names)


def walk(fs: Any, inner: str) -> list[dict[str, Any]]:
    """What fsspec knows of every file below a folder of `fs`; nothing where there is no such folder. Raises OSError.

    fsspec's own `find` leaves out the folders that it cannot list, unless the file system has a better one.
    """
    place = fs.unstrip_protocol(inner)
    with asking(place):
        default = AsyncFileSystem._find if isinstance(fs, AsyncFileSystem) else AbstractFileSystem.find
        if getattr(type(fs), default.__name__) is not default:
            return [info for info in fs.find(inner, detail=True).values() if info["type"] == "file"]
        try:
            waiting, found = list(fs.ls(inner, detail=True)), []
        except FileNotFoundError:
            return []
        while waiting:
            info = waiting.pop()
            if info["type"] == "directory" and info["name"].rstrip("/") != inner.rstrip("/"):
                waiting += fs.ls(info["name"], detail=True)
            elif info["type"] == "file":
                found.append(info)
        return found


@contextmanager
def publishing(path: str) -> Iterator[Path]:
    """A local folder to write into, which appears at `path`, flushed to the disk, once the block has ended without an
    error; else nothing is left of it. The block may also remove the folder itself. Raises StoreError where the folder
    cannot be written; an OSError of the block stays one."""
    target, made = Path(path), missing(str(Path(path).parent))
    temporary = target.with_name(f".{target.name}{UNFINISHED}")
    with holding():
        try:
            with writing_to(path):
                shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
                make_folder(str(temporary))
            yield temporary
            with writing_to(path):
                if temporary.exists():
                    flush_tree(str(temporary))
                    temporary.rename(target)
                    sync(str(target.parent))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            remove_empty(made)
            raise


def remove_leftovers(folder: str) -> None:
    """Delete what killed writers left below a local folder: unfinished files of ours and of zarr-python."""
    if is_url(folder):
        return
    for pattern in (f".*{UNFINISHED}", "*.partial"):
        for path in Path(folder).rglob(pattern):
            path.unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Delete a folder and what is in it, if it is there. Raises OSError."""
    if not exists(path):
        return
    if not is_url(path):
        shutil.rmtree(path)
        return
    fs, inner = fresh(path)
    with asking(path):
        fs.rm(inner, recursive=True)
