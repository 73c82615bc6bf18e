"""Files by local path or fsspec URL: the few operations that stores need, with atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from dimefm.errors import StoreError

GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What a file that is not there, or not to be read, raises; any other OSError may be of the moment."""

_UNFINISHED = ".unfinished"
_BLOCK = 8 * 1024**2
_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google")


def is_url(path: str) -> bool:
    """True for s3://..., gs://... and the like; False for local paths."""
    return "://" in path


def absolute(path: str) -> str:
    """The same place whatever the working directory: an absolute local path, or the URL as it is."""
    path = path.removeprefix("file://")
    return path if is_url(path) else str(Path(path).expanduser().absolute())


def local(path: str, what: str) -> str:
    """`absolute`, for what can only lie on a local file system. Raises StoreError for a URL."""
    if is_url(absolute(path)):
        raise StoreError(f"{path}: {what} must be a local path", remedy="give a local folder and copy it up afterwards")
    return absolute(path)


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises StoreError where it cannot be had."""
    try:
        fs, inner = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{path}: {error}", remedy="install the fsspec package for it, such as s3fs or gcsfs"
        ) from None
    return fs, inner


def _fresh(path: str) -> tuple[Any, str]:
    """`filesystem`, which has forgotten what it listed before: other processes, and zarr, write to the same place."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return fs, inner


def join(base: str, name: str) -> str:
    """`name` within `base`, for paths and URLs alike."""
    return f"{base.rstrip('/')}/{name}"


def digest_file(path: str) -> str:
    """sha256 of a file, read in pieces, as hex. Raises OSError."""
    digest = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tree(folder: str) -> set[str]:
    """The files below a folder, by path within it; without hidden ones, such as a lock."""
    if is_url(folder):
        fs, inner = _fresh(folder)
        found = [name[len(inner.rstrip("/")) + 1 :] for name in fs.find(inner)]
    else:
        found = [p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()]
    return {name for name in found if not name.rpartition("/")[2].startswith(".")}


def exists(path: str) -> bool:
    """Whether a file or folder is at `path`."""
    if not is_url(path):
        return Path(path).exists()
    fs, inner = _fresh(path)
    return bool(fs.exists(inner))


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes [offset, offset + size) of a file, fewer where it ends earlier. Raises OSError."""
    if size == 0:
        return b""
    if not is_url(path):
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    fs, inner = filesystem(path)
    try:
        return bytes(fs.cat_file(inner, start=offset, end=None if size is None else offset + size))
    except OSError as error:
        # Object stores refuse a range that begins at the end or later, where a local file gives no bytes.
        if error.errno == errno.EINVAL:
            fs.invalidate_cache()  # what it was when a listing was made says nothing of now
            if fs.info(inner)["size"] <= offset:
                return b""
        raise
    except Exception as error:  # of a client's own kind, such as botocore's for a connection that is refused
        raise OSError(f"{path}: {error}") from error


def write_atomic(path: str, data: bytes) -> None:
    """Write a whole file so that a reader, or a kill at any instant, sees all of it or none. Raises StoreError."""
    with writing_to(path):
        if is_url(path):
            fs, inner = filesystem(path)
            fs.pipe_file(inner, data)
            return
        with writing_atomically(path) as file:
            file.write(data)


def create(path: str, data: bytes) -> bool:
    """Write a file at a URL unless one is there; whether it was written. Of two that try at once one succeeds, where
    the store knows such a condition (S3, GCS); elsewhere both may. Raises StoreError."""
    with writing_to(path):
        fs, inner = _fresh(path)
        if fs.exists(inner):  # there are stores that ignore the condition
            return False
        try:
            fs.pipe_file(inner, data, mode="create")
            return True
        except FileExistsError:
            return False
        except Exception:
            fs.invalidate_cache()
            if fs.exists(inner):  # another's was written at the same time
                return False
        fs.pipe_file(inner, data)  # the store, or its client, knows no condition; or it says now what is wrong
        return True


@contextmanager
def writing_atomically(path: str) -> Iterator[Any]:
    """A binary file to write to, which is at `path` only once the block has ended without an error. Raises OSError."""
    if is_url(path):
        fs, inner = filesystem(path)
        file = fs.open(inner, "wb", autocommit=False)
        fs.transaction.files.remove(file)  # which would be committed with those of other threads
        try:
            with file:
                yield file
        except BaseException:
            file.discard()
            raise
        file.commit()
        return
    target = Path(path)
    make_folder(str(target.parent))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(str(target.parent))


@contextmanager
def publishing(path: str) -> Iterator[Path]:
    """A local folder to write into, which is at `path`, with all that is in it on the disk, only once the block has
    ended without an error; nothing is left of one that has not, and a block may remove the folder itself. Raises
    StoreError where the folder cannot be written; an OSError of the block stays what it is."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}{_UNFINISHED}")
    try:
        with writing_to(path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a kill
            make_folder(str(temporary))
        yield temporary
        with writing_to(path):
            if temporary.exists():
                flush_tree(str(temporary))
                temporary.rename(target)
                _sync(str(target.parent))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder(path: str) -> None:
    """Make a local folder and those that it is in, where they are not there, and see their names through to the disk:
    a file that is flushed could else be lost with its folder. Raises OSError."""
    folder, new = Path(path), list[Path]()
    while not folder.exists():
        new.append(folder)
        folder = folder.parent
    Path(path).mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync(str(made.parent))


def flush(path: str) -> None:
    """See a local file or folder and its name through to the disk, so that a commit written after it is not there
    without it."""
    if not is_url(path):
        _sync(path)
        _sync(str(Path(path).parent))


def flush_tree(folder: str) -> None:
    """`flush` of a local folder and of everything below it."""
    if not is_url(folder):
        for place in [*Path(folder).rglob("*"), Path(folder), Path(folder).parent]:
            _sync(str(place))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: str) -> None:
    """Delete a file, if it is there; of a local one that is on the disk before what is written next."""
    if not is_url(path):
        with suppress(FileNotFoundError):
            Path(path).unlink()
            _sync(str(Path(path).parent))
        return
    fs, inner = _fresh(path)
    if fs.exists(inner):
        fs.rm_file(inner)


def remove_leftovers(folder: str) -> None:
    """Delete what killed writers left below a local folder: unfinished files of ours and of zarr-python."""
    if is_url(folder):
        return
    for pattern in (f".*{_UNFINISHED}", "*.partial"):
        for path in Path(folder).rglob(pattern):
            path.unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Delete a folder and what is in it, if it is there."""
    if not is_url(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    fs, inner = _fresh(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def read_json(path: str) -> Any:
    """Parsed JSON. Raises StoreError where the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}", remedy="it is damaged; write it again") from None


def write_json(path: str, value: object) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def listing(path: str) -> list[str]:
    """Names of the files in a folder, sorted; empty where there is no such folder. Leaves out hidden files."""
    if not is_url(path):
        folder = Path(path)
        names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    else:
        fs, inner = _fresh(path)
        names = [name.rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False)] if fs.exists(inner) else []
    return sorted(name for name in names if not name.startswith("."))


@contextmanager
def writing_to(path: str) -> Iterator[None]:
    """For a block that only writes: an OSError in it becomes a StoreError about `path`, and so does what the client of
    an object store raises of its own, as for a connection that is refused."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not is_url(path) or not (package in _CLIENTS or isinstance(error, NotImplementedError)):
            raise
        raise cannot_write(path, OSError(str(error) or "it is read-only")) from error


def cannot_write(path: str, error: OSError) -> StoreError:
    """What a full disk, a read-only folder or a lost share becomes."""
    remedy = "make room, or mend the permissions, and run the same command again; what was finished is kept"
    return StoreError(f"{path} cannot be written: {error.strerror or error}", remedy=remedy)
