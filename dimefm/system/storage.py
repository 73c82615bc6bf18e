"""Files by local path or fsspec URL: the few operations that stores need, with atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from dimefm.errors import DimefmError, StoreError

GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What a file that is not there raises. Any other OSError is of the storage or of the right to read it."""

CONNECTIONS = 32
"""Requests to an object store at a time: at the 90 MB/s or so of one connection they fill 25 Gb/s."""

_UNFINISHED = ".unfinished"
_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")  # as zarr-python calls what it is writing
_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
_BLOCK = 8 * 1024**2
_NOT_THERE = (404, 410)  # of HTTP
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
        fs, inner = fsspec.url_to_fs(path, **_options(path))
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{path}: {error}", remedy="install the fsspec package for it, such as s3fs or gcsfs"
        ) from None
    return fs, inner


def _options(path: str) -> dict[str, Any]:
    """What the client is made with: botocore would make the requests of all threads wait for ten connections."""
    if not path.startswith("s3://"):
        return {}
    own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": CONNECTIONS, **own}}


def _fresh(path: str) -> tuple[Any, str]:
    """`filesystem`, which has forgotten what it listed before: other processes, and zarr, write to the same place."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return fs, inner


def join(base: str, name: str) -> str:
    """`name` within `base`, for paths and URLs alike."""
    return f"{base.rstrip('/')}/{name}"


@contextmanager
def asking(path: str) -> Iterator[None]:
    """For a block that asks about `path`: whatever the storage's client raises becomes an OSError with a number and a
    path, of the class that belongs to the number."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) not in _NOT_THERE:
            raise OSError(errno.EIO, str(cause), path) from error  # fsspec calls all that goes wrong by http not found
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        raise OSError(number, error.strerror or str(error), path) from error
    except DimefmError:
        raise
    except Exception as error:  # of a client's own kind, such as botocore's for a connection that is refused
        raise OSError(errno.EIO, str(error), path) from error


@contextmanager
def naming(path: str) -> Iterator[None]:
    """For a block that reads a local file: an OSError in it names the file, as one of opening it does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = path
        raise


def digest_file(path: str) -> str:
    """sha256 of a file, read in pieces, as hex. Raises OSError."""
    digest = hashlib.sha256()
    with asking(path), fsspec.open(path, "rb") if is_url(path) else Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tree(folder: str) -> set[str]:
    """The files below a folder, by path within it; without hidden ones, such as a lock. Raises OSError."""
    if is_url(folder):
        fs, inner = _fresh(folder)
        found = [info["name"][len(inner.rstrip("/")) + 1 :] for info in walk(fs, inner)]
    else:
        found = [os.path.relpath(f"{root}/{name}", folder) for root, name in walk_local(folder)]
    return {name for name in found if not name.rpartition("/")[2].startswith(".")}


def walk_local(folder: str) -> Iterator[tuple[str, str]]:
    """Every file below a local folder: the folder that it is in, and its name; nothing where there is no such folder.

    Raises OSError for a folder that cannot be listed, but for the lost+found of a file system, which is root's.
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


def exists(path: str) -> bool:
    """Whether a file or folder is at `path`. Raises OSError where that cannot be known: what is there, but refused,
    must not be taken for free."""
    try:
        if not is_url(path):
            os.stat(path)  # noqa: PTH116  # Path.exists says False for every error, from Python 3.14 on
            return True
        fs, inner = _fresh(path)
        with asking(path):
            fs.info(inner)  # fs.exists says False for every error, by default
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def size(path: str) -> int:
    """Bytes of a file. Raises OSError."""
    if not is_url(path):
        return Path(path).stat().st_size
    fs, inner = _fresh(path)
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
            # Memory is taken for what is asked: a damaged header may say petabytes.
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
            # Object stores refuse a range that begins at the end or later, where a local file gives no bytes.
            if error.errno == errno.EINVAL:
                fs.invalidate_cache()  # what it was when a listing was made says nothing of now
                if fs.info(inner)["size"] <= offset:
                    return b""
            raise


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
    if exists(path):
        fs, inner = _fresh(path)
        with asking(path):
            fs.rm_file(inner)


def remove_leftovers(folder: str) -> None:
    """Delete what killed writers left below a local folder: unfinished files of ours and of zarr-python."""
    if is_url(folder):
        return
    for pattern in (f".*{_UNFINISHED}", "*.partial"):
        for path in Path(folder).rglob(pattern):
            path.unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Delete a folder and what is in it, if it is there. Raises OSError."""
    if not exists(path):
        return
    if not is_url(path):
        shutil.rmtree(path)
        return
    fs, inner = _fresh(path)
    with asking(path):
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
    """Names of the files in a folder, sorted; empty where there is no such folder. Leaves out hidden files, and
    what zarr-python has not finished.

    Raises OSError where that cannot be known.
    """
    try:
        if not is_url(path):
            names = [entry.name for entry in os.scandir(path)]
        else:
            fs, inner = _fresh(path)
            with asking(path):
                names = [name.rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # An empty name is the mark that S3 consoles put into a folder they make.
    return sorted(name for name in names if name and not name.startswith(".") and not _PARTIAL.fullmatch(name))


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
