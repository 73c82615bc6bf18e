"""Files that a command keeps for itself, should it be stopped: the data, then the crc32c of it, little-endian. One that
was damaged in between is as good as none, and is made again."""

from __future__ import annotations

import google_crc32c

from dimefm.system import storage

_CRC = 4


def write_checked(path: str, data: bytes) -> None:
    """Write `data` with its checksum. Raises StoreError where it cannot be written."""
    with storage.writing_to(path):
        storage.write_atomic(path, data + google_crc32c.value(data).to_bytes(_CRC, "little"))


def read_checked(path: str) -> bytes | None:
    """What `write_checked` wrote; None where it is missing or damaged."""
    if not storage.exists(path):
        return None
    content = storage.read_bytes(path)
    data, checksum = content[:-_CRC], content[-_CRC:]
    return data if google_crc32c.value(data).to_bytes(_CRC, "little") == checksum else None
