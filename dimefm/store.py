"""The embedding store: one Zarr v3 group per cached source, written a shard at a time, read by row.

Shapes: N rows asked for, D embedding width.
"""

from __future__ import annotations

import hashlib
import io
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from cache_schemas import Commit, EmbeddingStore, Failure, Status, parse_plan
from cache_schemas.embedding_store import (
    ATTRIBUTES_KEY,
    COMMITS,
    EMBEDDING,
    EMBEDDING_DTYPE,
    STATUS,
    STATUS_DTYPE,
    commit_path,
    rows_path,
)
from dimefm import storage
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.mapped import MappedArray

_COMMIT_NAME = re.compile(r"(\d{6,})\.json")


class Store:
    """A store on disk. Cheap to open, whatever its size: nothing but its attributes is read."""

    def __init__(self, path: str) -> None:
        """Open a store. Raises StoreError where there is none, SchemaError where its attributes are not valid."""
        self.path = storage.absolute(path)
        self.group = open_group(self.path)
        attributes = group_attributes(self.group, self.path)
        self.schema = EmbeddingStore.parse(attributes, storage.join(self.path, "zarr.json"))
        self._embedding = _array(self.group, EMBEDDING)
        self._status = _array(self.group, STATUS)
        self._mapped = MappedArray.open(self.path, EMBEDDING, self._embedding)
        self._plan = lru_cache(maxsize=128)(self._read_plan)

    # -- writing ------------------------------------------------------------------------------------------------------

    @staticmethod
    def create(path: str, schema: EmbeddingStore) -> Store:
        """Make the arrays, and last the attributes: until they are there the store counts as not planned."""
        group = zarr.open_group(storage.absolute(path), mode="a")
        if ATTRIBUTES_KEY in group.attrs:
            raise OutputExistsError(f"{path} is a store already", remedy="give another place")
        rows, shard = schema.rows, schema.shard_rows
        create_array(group, EMBEDDING, (rows, schema.dim), EMBEDDING_DTYPE, (schema.chunk_rows, schema.dim), shard)
        create_array(group, STATUS, (rows,), STATUS_DTYPE, (shard,), shard)
        group.attrs[ATTRIBUTES_KEY] = schema.to_json()
        return Store(path)

    def write_shard(
        self,
        shard: int,
        embedding_ND: np.ndarray[Any, Any],
        status_N: np.ndarray[Any, Any],
        failures: Sequence[Failure],
        *,
        device: str,
        seconds: float,
    ) -> Commit:
        """Write one whole shard, then its commit. Until the commit is there, the shard counts as not done."""
        start, stop = self.schema.shard_range(shard)
        self._embedding[start:stop] = embedding_ND
        self._status[start:stop] = status_N
        digest = digest_arrays(embedding_ND, status_N)
        commit = make_commit(shard, start, status_N, failures, digest=digest, device=device, seconds=seconds)
        storage.write_json(storage.join(self.path, commit_path(shard)), commit.to_json())
        return commit

    # -- progress -----------------------------------------------------------------------------------------------------

    def committed(self) -> set[int]:
        """The shards that are done."""
        names = storage.listing(storage.join(self.path, COMMITS))
        return {int(match[1]) for name in names if (match := _COMMIT_NAME.fullmatch(name))}

    def commits(self) -> Iterator[Commit]:
        """The commits in order of shard."""
        for shard in sorted(self.committed()):
            path = storage.join(self.path, commit_path(shard))
            yield Commit.parse(storage.read_json(path), path)

    def require_complete(self) -> None:
        """Raises StoreError unless every shard is done."""
        done, shards = len(self.committed()), self.schema.shards
        if done < shards:
            remedy = "run the command that writes it again; it goes on where it stopped"
            raise StoreError(f"{self.path} is unfinished: {done} of {shards} shards are done", remedy=remedy)

    def require_kind(self, kind: str) -> None:
        """Raises MismatchError for a store of the other kind: images where texts belong, or the reverse."""
        if self.schema.kind != kind:
            what = f"{self.path} holds {self.schema.kind} embeddings where {kind} embeddings belong"
            raise MismatchError(what, remedy="look whether two stores were swapped")

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Embeddings of rows start..stop-1, float16 (N, D). Rows without an embedding are zero."""
        if self._mapped is not None:
            return self._mapped.read(start, stop)
        return np.asarray(self._embedding[start:stop])

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings of any rows in any order, float16 (N, D)."""
        if self._mapped is not None:
            return self._mapped.gather(rows_N)
        return np.asarray(self._embedding.oindex[rows_N])

    def status(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Status codes, uint8 (N,)."""
        return np.asarray(self._status[start : self.schema.rows if stop is None else stop])

    def plan(self, shard: int) -> pa.Table:
        """The plan of one shard: its rows' keys and where they are. Kept for the last few shards asked for."""
        return self._plan(shard)

    def _read_plan(self, shard: int) -> pa.Table:
        path = storage.join(self.path, rows_path(shard))
        try:
            # One thread, no dataset scanner: a table is small, and Arrow's threads can outlive the interpreter.
            table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path))).read(use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"{path} cannot be read: {error}", remedy="the plan is damaged; cache again") from None
        return parse_plan(table, self.schema.kind, *self.schema.shard_range(shard), path)

    def samples(self, rows_N: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        """The plan's entries of any rows, in the order asked for."""
        found: list[dict[str, Any]] = [{}] * len(rows_N)
        shard_N, within_N = np.divmod(np.asarray(rows_N, np.int64), self.schema.shard_rows)
        for shard in np.unique(shard_N):
            places = np.flatnonzero(shard_N == shard)
            entries = self.plan(int(shard)).take(within_N[places]).to_pylist()
            for place, entry in zip(places, entries, strict=True):
                found[place] = entry
        return found


def make_commit(
    shard: int,
    start: int,
    status_N: np.ndarray[Any, Any],
    failures: Sequence[Failure],
    *,
    digest: str,
    device: str,
    seconds: float,
) -> Commit:
    """The commit of a shard whose rows, from `start` on, have these status codes."""
    codes, counts = np.unique(status_N, return_counts=True)
    return Commit(
        shard=shard,
        start=start,
        stop=start + len(status_N),
        counts={Status(code).name: int(n) for code, n in zip(codes, counts, strict=True)},
        failures=tuple(failures),
        digest=digest,
        device=device,
        seconds=round(seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def require_same_teacher(one: Store, other: Store) -> None:
    """Raises MismatchError unless both stores' embeddings come from the same teacher; precision may differ."""
    differences = one.schema.teacher.differences(other.schema.teacher, ignore=("precision",))
    if differences:
        lines = "".join(f"\n  - teacher.{d}" for d in differences)
        what = f"{one.path} and {other.path} come from different teachers:{lines}"
        raise MismatchError(what, remedy="cache both with the same teacher")


def write_plan(path: str, shard: int, table: pa.Table) -> None:
    """Write the plan of one shard."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(storage.join(path, rows_path(shard)), sink.getvalue())


def open_group(path: str) -> zarr.Group:
    """The Zarr group at `path`, for reading and writing. Raises StoreError where there is none."""
    try:
        return zarr.open_group(path, mode="r+")
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        pass
    remedy = "check the path" if not storage.exists(path) else "it is unfinished or something else; cache again"
    raise StoreError(f"{path} is not a dimefm store", remedy=remedy)


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
    )


def digest_arrays(*arrays: np.ndarray[Any, Any]) -> str:
    """sha256 over the bytes of the arrays, in order, as hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers that are written."""
    packages = ("dimefm", "torch", "open_clip_torch", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _array(group: zarr.Group, name: str) -> Any:
    try:
        return group[name]
    except KeyError:
        raise StoreError(f"{group.store_path} has no array {name!r}", remedy="it is damaged; cache again") from None
