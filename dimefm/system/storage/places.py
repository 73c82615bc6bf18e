"""Where a file is: local paths and fsspec URLs alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec

from dimefm.errors import StoreError

CONNECTIONS = 32
"""Requests to an object store at a time: at the 90 MB/s or so of one connection they fill 25 Gb/s."""


def is_url(path: str) -> bool:
    """True for s3://..., gs://... and others; False for local paths."""
    return "://" in path


def absolute(path: str) -> str:
    """The same place in any working directory: an absolute local path, or the URL as it is."""
    path = path.removeprefix("file://")
    return path if is_url(path) else str(Path(path).expanduser().absolute())


def local(path: str, what: str) -> str:
    """`absolute`, for `what` can only be on a local file system. Raises StoreError for a URL."""
    if is_url(absolute(path)):
        raise StoreError(f"{path}: {what} must be a local path", remedy="give a local path and copy it up afterwards")
    return absolute(path)


def join(base: str, name: str) -> str:
    """`name` within `base`, for paths and URLs alike."""
    return f"{base.rstrip('/')}/{name}"


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises StoreError where its package is not installed."""
    try:
        fs, inner = fsspec.url_to_fs(path, **_options(path))
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{path}: {error}", remedy="install the fsspec package for it, such as s3fs or gcsfs"
        ) from None
    return fs, inner


def _options(path: str) -> dict[str, Any]:
    """Options for the client: by default, botocore makes all threads share ten connections."""
    if not path.startswith("s3://"):
        return {}
    own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": CONNECTIONS, **own}}


def fresh(path: str) -> tuple[Any, str]:
    """`filesystem` without what it has listed before: other processes, and zarr, write to the same place."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return fs, inner
