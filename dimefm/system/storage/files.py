"""Single files: read, measured, written so that a kill at any instant leaves all or nothing, removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from dimefm.errors import StoreError
from dimefm.system.stopping import holding
from dimefm.system.storage.durable import UNFINISHED, make_folder, sync
from dimefm.system.storage.failures import asking, naming, writing_to
from dimefm.system.storage.places import filesystem, fresh, is_url

_BLOCK = 8 * 1024**2


def exists(path: str) -> bool:
    """Whether a file or folder is at `path`. Raises OSError where that cannot be known: a place that may not be looked
    at must not count as empty."""
    try:
        if not is_url(path):
            os.stat(path)  # noqa: PTH116  # Path.exists says False for every error, from Python 3.14 on
            return True
        fs, inner = fresh(path)
        with asking(path):
            fs.info(inner)  # fs.exists says False for every error, by default
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def size(path: str) -> int:
    """Bytes of a file. Raises OSError."""
    if not is_url(path):
        return Path(path).stat().st_size
    fs, inner = fresh(path)
    with asking(path):
        return int(fs.size(inner))


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes [offset, offset + size) of a file, fewer where it ends earlier. Raises OSError."""
    if size is not None and size <= 0:
        return b""
    if not is_url(path):
        with naming(path), Path(path).open("rb") as file:
            if size is None:
                file.seek(offset)
                return file.read()
            # read() takes memory for all that is asked for, and a damaged header may say petabytes.
            there = os.fstat(file.fileno()).st_size - offset
            if there <= 0:
                return b""
            file.seek(offset)
            return file.read(min(size, there))
    fs, inner = filesystem(path)
    with asking(path):
        try:
            return bytes(fs.cat_file(inner, start=offset, end=None if size is None else offset + size))
        except OSError as error:
            # Object stores refuse a range that begins at the end or later; a local file gives no bytes there.
            if error.errno == errno.EINVAL:
                fs.invalidate_cache()  # the size of an earlier listing may be out of date
                if fs.info(inner)["size"] <= offset:
                    return b""
            raise


def digest_file(path: str) -> str:
    """sha256 of a file, read in pieces, as hex. Raises OSError."""
    digest = hashlib.sha256()
    with asking(path), fsspec.open(path, "rb") if is_url(path) else Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def write_atomic(path: str, data: bytes) -> None:
    """Write a whole file: a reader sees all of it or nothing, even after a kill at any instant. Raises StoreError."""
    with writing_to(path):
        if is_url(path):
            fs, inner = filesystem(path)
            fs.pipe_file(inner, data)
            return
        with writing_atomically(path) as file:
            file.write(data)


def create(path: str, data: bytes) -> bool:
    """Write a file at a URL unless there is one; whether it was written. If two processes try at once, one succeeds
    where the object store has such a condition (S3, GCS, Azure); elsewhere both may. Raises StoreError."""
    with writing_to(path):
        fs, inner = fresh(path)
        if fs.exists(inner):  # some object stores ignore the condition
            return False
        try:
            fs.pipe_file(inner, data, mode="create")
            return True
        except FileExistsError:
            return _holds(fs, inner, data)
        except Exception:
            fs.invalidate_cache()
            if fs.exists(inner):  # another process has written it at the same time
                return _holds(fs, inner, data)
        fs.pipe_file(inner, data)  # the store, or its client, has no such condition; a real error is raised again here
        return True


def _holds(fs: Any, inner: str, data: bytes) -> bool:
    """Whether a file that is in the way is our own: its client asks again where the answer to the first try is lost."""
    return bytes(fs.cat_file(inner)) == data


def refuses_second(path: str, data: bytes) -> bool:
    """Write a file at a URL twice, and look whether the storage itself refuses the second: whether `create` can be
    relied on where two processes try at once. Raises StoreError."""
    with writing_to(path):
        fs, inner = fresh(path)
        if getattr(fs.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file:  # it looks, and then writes
            return False
        fs.pipe_file(inner, data)
        try:
            fs.pipe_file(inner, data, mode="create")
        except FileExistsError:
            return True
        except Exception:  # its client knows no such condition
            return False
        return False


@contextmanager
def writing_atomically(path: str) -> Iterator[Any]:
    """A binary file to write to, which appears at `path` once the block has ended without an error. Raises OSError."""
    if is_url(path):
        fs, inner = filesystem(path)
        file = fs.open(inner, "wb", autocommit=False)
        fs.transaction.files.remove(file)  # else it would be committed with the files of other threads
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
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{UNFINISHED}")
    with holding():
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(str(target.parent))


def remove_file(path: str) -> None:
    """Delete a file, if there is one. For a local one, that is on the disk before anything that is written next."""
    if not is_url(path):
        with suppress(FileNotFoundError):
            Path(path).unlink()
            sync(str(Path(path).parent))
        return
    if exists(path):
        fs, inner = fresh(path)
        with asking(path):
            fs.rm_file(inner)
