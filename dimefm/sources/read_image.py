"""Read the encoded image that a sample or a row of a plan names, from whatever kind of file it is in.

`read_image` is the usual way: it asks again and gives the reason where there is no image. `read_encoded` asks once, and
raises.
"""

from __future__ import annotations

import base64
import time
from typing import NamedTuple

from cache_schemas import Status
from cache_schemas.plan import PlannedImage
from dimefm.errors import RUN_AGAIN, UnreadableError
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.sources.base import ImageSample
from dimefm.sources.parquet import DamagedParquetError, split_column
from dimefm.sources.parquet_cells import read_cell
from dimefm.system import storage
from dimefm.system.named_paths import named


class ImagePlace(NamedTuple):
    """Where an encoded image is, without its name: see sources.base.ImageSample."""

    file: str
    offset: int
    size: int


EncodedImage = ImagePlace | ImageSample | PlannedImage

_WAITS = (0.5, 2.0)  # seconds before a failed read is tried again


def read_image(image: EncodedImage, *, accept_missing: bool = False) -> bytes | DecodeError:
    """The bytes of an image, or why they cannot be had: MISSING where its file is gone, or with `accept_missing` where
    access is refused; TRUNCATED where the file is too short; and what `read_encoded` raises.

    Raises UnreadableError where the storage does not answer, after three tries, or refuses access, and StoreError for
    a file that a plan may not name. caching.permanent_failures decides which failures may become a row's status.
    """
    for wait in (*_WAITS, None):
        try:
            data = read_encoded(image)
            break
        except storage.GONE as error:
            return DecodeError(Status.MISSING, str(error))
        except DecodeError as error:
            return error
        except OSError as error:
            refused = isinstance(error, PermissionError)  # by the file's mode, or because a token has run out
            if refused and accept_missing:
                return DecodeError(Status.MISSING, str(error))
            if wait is None:
                remedy = "run the same command again once the storage answers; what was finished is kept"
                if refused:
                    remedy = f"mend the permissions, or renew the credentials, and {RUN_AGAIN}"
                what = f"{image.file} cannot be read: {error.strerror or error}"
                raise UnreadableError(what, remedy=remedy) from error
            time.sleep(wait)
    if len(data) < image.size and not image.file.endswith(".tsv"):
        return DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {image.size:,} bytes")
    return data


def read_encoded(image: EncodedImage) -> bytes:
    """The bytes of an image, from any kind of file. Safe in threads and forked processes.

    An ordinary file that was cut short gives fewer bytes. A null in a Parquet file gives none. Raises
    FileNotFoundError where the file is gone, another OSError where the storage does not answer; DecodeError for a .tsv
    or Parquet file that was cut short or damaged, for text that is not base64, and for more than MAX_BYTES; and
    StoreError for a file that a document may not name (system.named_paths).
    """
    file, offset, size = image.file, image.offset, image.size
    path, column = split_column(file)
    named(path, "the plan")
    if size > MAX_BYTES:
        raise DecodeError(Status.TOO_LARGE, f"{size:,} bytes, as {file} says; the limit is {MAX_BYTES:,}")
    if column is not None:
        return _from_parquet(path, column, offset)
    data = storage.read_bytes(file, offset, size)
    if not file.endswith(".tsv"):
        return data
    if len(data) < size:
        raise DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {size:,} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise DecodeError(Status.UNDECODABLE, f"not base64: {error}") from None


def _from_parquet(path: str, column: str, row: int) -> bytes:
    try:
        return read_cell(path, column, row) or b""
    except IndexError:
        raise DecodeError(Status.TRUNCATED, f"{path} has no row {row:,}") from None
    except KeyError:
        raise DecodeError(Status.UNDECODABLE, f"{path} has no column {column!r}") from None
    except DamagedParquetError as error:
        raise DecodeError(Status.UNDECODABLE, f"{path} is damaged: {error}") from None
