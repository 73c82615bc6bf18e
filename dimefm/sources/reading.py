"""The encoded image that a row of a plan names, whatever kind of file it is in."""

from __future__ import annotations

import base64

from cache_schemas import Status
from dimefm import storage
from dimefm.decode import MAX_BYTES, DecodeError
from dimefm.named import named
from dimefm.sources.parquet import SUFFIX, DamagedParquetError, read_cell


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
