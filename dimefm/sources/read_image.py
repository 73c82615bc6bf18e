"""The encoded image that a row of a plan names, whatever kind of file it is in."""

from __future__ import annotations

import base64
import time
from typing import Any

from cache_schemas import Status
from dimefm.errors import RUN_AGAIN, UnreadableError
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.sources.parquet import SUFFIX, DamagedParquetError, read_cell
from dimefm.system import storage
from dimefm.system.named_paths import named


def read_encoded(file: str, offset: int, size: int) -> bytes:
    """The bytes of the image that ImageSample(key, file, offset, size) names. Safe in threads and forked processes.

    An ordinary file that was cut short gives fewer bytes. A null in a Parquet file gives none. Raises
    FileNotFoundError where the file is gone, another OSError where the storage does not answer, and DecodeError for a
    .tsv or Parquet file that was cut short or damaged, or whose text is not base64, and for more than MAX_BYTES.
    """
    if size > MAX_BYTES:
        raise DecodeError(Status.TOO_LARGE, f"{size:,} bytes, as {file} says; the limit is {MAX_BYTES:,}")
    path, mark, column = file.partition(f"{SUFFIX}#")
    if mark:
        return _from_parquet(path + SUFFIX, column, offset)
    data = storage.read_bytes(file, offset, size)
    if not file.endswith(".tsv"):
        return data
    if len(data) < size:
        raise DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {size:,} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise DecodeError(Status.UNDECODABLE, f"not base64: {error}") from None


def read_planned(file: str, offset: int, size: int) -> bytes:
    """`read_encoded` of what a row of a store's plan names. Raises StoreError too, for what a document may not name."""
    path, mark, _ = file.partition(f"{SUFFIX}#")
    named(path + SUFFIX if mark else path, "the plan")
    return read_encoded(file, offset, size)


def _from_parquet(path: str, column: str, row: int) -> bytes:
    try:
        return read_cell(path, column, row) or b""
    except IndexError:
        raise DecodeError(Status.TRUNCATED, f"{path} has no row {row:,}") from None
    except KeyError:
        raise DecodeError(Status.UNDECODABLE, f"{path} has no column {column!r}") from None
    except DamagedParquetError as error:
        raise DecodeError(Status.UNDECODABLE, f"{path} is damaged: {error}") from None


CRASH = "crash"
"""What a row has beside the columns of its plan where it must not be decoded (see caching.crashing_images): the
reason."""


_WAITS = (0.5, 2.0)  # seconds before a failed read is tried again


def read_image(row: dict[str, Any], *, accept_missing: bool = False) -> bytes | DecodeError:
    """The bytes of a sample, or why they cannot be had: MISSING where its file is gone, and with `accept_missing` where
    it is refused. dimefm.caching.lasting_failures says which of these may become a row's status.

    Raises UnreadableError where the storage does not answer, after it was asked again, or refuses, and StoreError for
    what a plan may not name.
    """
    if CRASH in row:
        return DecodeError(Status.CRASHED, row[CRASH])
    for wait in (*_WAITS, None):
        try:
            data = read_planned(row["file"], row["offset"], row["size"])
            break
        except storage.GONE as error:
            return DecodeError(Status.MISSING, str(error))
        except DecodeError as error:
            return error
        except OSError as error:
            refused = isinstance(error, PermissionError)  # by its mode, or as the token has run out
            if refused and accept_missing:
                return DecodeError(Status.MISSING, str(error))
            if wait is None:
                remedy = "run the same command again once the storage answers; what was finished is kept"
                if refused:
                    remedy = f"mend the permissions, or renew the credentials, and {RUN_AGAIN}"
                what = f"{row['file']} cannot be read: {error.strerror or error}"
                raise UnreadableError(what, remedy=remedy) from error
            time.sleep(wait)
    if len(data) < row["size"] and not row["file"].endswith(".tsv"):
        return DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {row['size']:,} bytes")
    return data
