"""Zarr groups and arrays as this project stores them: create, open, write, and digest."""

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
from dimefm.system.near_names import did_you_mean_path

DAMAGED = "dimefm verify STORE --repair marks damaged shards; then run the command that wrote the store again"


def open_group(path: str) -> zarr.Group:
    """The Zarr group at `path`, for reading and writing. Raises StoreError where there is none, OSError where the
    storage does not answer."""
    if storage.is_url(path):
        # zarr asks for several files at once, and would log an error for each.
        storage.exists(storage.join(path, "zarr.json"))
    try:
        with reading_zarr(path):
            return zarr.open_group(zarr_place(path), mode="r+", zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        pass
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # raised by zarr for a damaged one
        raise StoreError(f"{path}/zarr.json is damaged: {error}", remedy="write the store again") from None
    if not storage.exists(path):
        remedy = did_you_mean_path(path, "check the path")
        raise StoreError(f"{path} is not a dimefm store: it does not exist", remedy=remedy)
    remedy = "name a store; if this one is unfinished, run the command that makes it again"
    raise StoreError(f"{path} is not a dimefm store", remedy=remedy)


def new_group(path: str) -> zarr.Group:
    """The Zarr group at `path`, which is made if there is none, to create arrays in."""
    document = storage.join(path, "zarr.json")
    if storage.exists(document) and not storage.size(document):  # left by a loss of power
        storage.remove_file(document)
    return zarr.open_group(zarr_place(path), mode="a")


def zarr_place(path: str) -> str | Path:
    """`path` as zarr takes it: a local one as a Path, since in a string zarr reads :: as a chain of file systems."""
    return path if storage.is_url(path) else Path(path)


@contextmanager
def reading_zarr(path: str) -> Iterator[None]:
    """Around a block in which zarr reads at `path`: errors of an object store's own client become an OSError, and each
    OSError names a file. Errors of Python's own kinds, which zarr raises for damaged files, stay."""
    try:
        with storage.naming(path):
            yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise
    except Exception as error:
        with storage.asking(path):
            raise error


def group_attributes(group: zarr.Group, path: str) -> Any:
    """The document in a group's attributes, under our key. Raises StoreError where there is none."""
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
    """Create an uncompressed array in chunks of whole rows, each with a crc32c, in shards of `shard_rows`."""
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
    """Write the attributes of a group, after its new arrays have been flushed to the disk. They are written by us and
    not by zarr, so that `dimefm verify` knows every byte, whatever the release of zarr."""
    for name in names:
        storage.flush_tree(storage.join(path, name))
    content = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: document}}
    storage.write_json(storage.join(path, "zarr.json"), content)


def write_rows(path: str, file: str, array: Any, start: int, values: np.ndarray[Any, Any]) -> None:
    """Write a whole shard of an array, which is in `file` within the group at `path`, and flush it to the disk. Raises
    OSError."""
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
    """`array_of`, checked against its spec, and set to write chunks of fill values too, so that a chunk that is absent
    was always lost."""
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
