"""Zarr groups and arrays as this project writes them: how they are made, opened and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from cache_schemas.embedding_store import ATTRIBUTES_KEY, ArraySpec
from dimefm.errors import StoreError
from dimefm.system import storage

DAMAGED = "dimefm verify STORE --repair marks damaged shards; then run the command that wrote the store again"


def open_group(path: str) -> zarr.Group:
    """The Zarr group at `path`, for reading and writing. Raises StoreError where there is none, OSError where the
    storage does not answer."""
    if storage.is_url(path):
        storage.exists(storage.join(path, "zarr.json"))  # zarr asks for several files at once, and all would complain
    try:
        with reading_zarr(path):
            return zarr.open_group(zarr_place(path), mode="r+")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        pass
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what zarr makes of a damaged one
        raise StoreError(f"{path}/zarr.json is damaged: {error}", remedy="write the store again") from None
    remedy = "check the path" if not storage.exists(path) else "it is unfinished or something else; cache again"
    raise StoreError(f"{path} is not a dimefm store", remedy=remedy)


def zarr_place(path: str) -> str | Path:
    """What zarr takes for `path`: a local one as Path, for in a string it takes :: for a chain of file systems."""
    return path if storage.is_url(path) else Path(path)


@contextmanager
def reading_zarr(path: str) -> Iterator[None]:
    """For a block in which zarr reads what is at `path`: what the client of an object store raises of its own becomes
    an OSError, and each OSError names a file. What zarr makes of damage stays: errors of Python's own kinds."""
    try:
        with storage.naming(path):
            yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise
    except Exception as error:
        with storage.asking(path):
            raise error


def group_attributes(group: zarr.Group, path: str) -> Any:
    """The document that a group of ours carries. Raises StoreError where it has none."""
    if ATTRIBUTES_KEY not in group.attrs:
        remedy = "it is another Zarr group, or was stopped while it was planned: run the same command again"
        raise StoreError(f"{path} is not a dimefm store", remedy=remedy)
    return group.attrs[ATTRIBUTES_KEY]


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    chunks: tuple[int, ...],
    shard_rows: int,
    *,
    fill: float = 0,
) -> None:
    """An uncompressed array in whole-row chunks with crc32c, sharded by `shard_rows`."""
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=(shard_rows, *chunks[1:]),
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(endian="little"),
        filters=None,
        fill_value=fill,
        overwrite=True,
        config={"write_empty_chunks": True},
    )


def write_attributes(path: str, names: Iterable[str], document: Mapping[str, object]) -> None:
    """Make a group one of ours, once the arrays of these names, new ones, are on the disk. Written as our other
    documents are, so that `dimefm verify` knows each byte, whatever zarr's release."""
    for name in names:
        storage.flush_tree(storage.join(path, name))
    content = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: document}}
    storage.write_json(storage.join(path, "zarr.json"), content)


def write_rows(path: str, file: str, array: Any, start: int, values: np.ndarray[Any, Any]) -> None:
    """Write a whole shard of an array, whose data are in `file` within the group at `path`, and see it through to the
    disk. Raises OSError."""
    place = storage.join(path, file)
    if not storage.is_url(place):
        storage.make_folder(place.rpartition("/")[0])
    array[start : start + len(values)] = values
    storage.flush(place)


def array_of(group: zarr.Group, path: str, name: str) -> Any:
    """The array `name` of the group at `path`. Raises StoreError where it is missing or damaged, OSError where the
    storage does not answer."""
    where = storage.join(path, name)
    try:
        with reading_zarr(where):
            return group[name]
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{where} cannot be opened: {error}", remedy="it is damaged; write the store again") from None


def open_array(group: zarr.Group, path: str, name: str, spec: ArraySpec) -> Any:
    """`array_of`, ready to be written with chunks of fill values too: an absent chunk is then always a loss."""
    where, array = storage.join(path, name), array_of(group, path, name)
    shape, dtype, chunks = array.shape, str(array.dtype), array.chunks
    expected = spec.shape, spec.dtype, (spec.chunk_rows, *spec.shape[1:])
    if (shape, dtype, chunks) != expected:
        what = f"{where} is {dtype} {shape} in chunks {chunks}, where {expected[1]} {expected[0]} {expected[2]} belongs"
        raise StoreError(what, remedy="it is damaged; cache again")
    return array.with_config({"write_empty_chunks": True})


def digest_arrays(*arrays: np.ndarray[Any, Any]) -> str:
    """sha256 over the bytes of the arrays, in order, as hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
