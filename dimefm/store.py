"""The embedding store: one Zarr v3 group per cached source, written a shard at a time, read by row.

Shapes: N rows asked for, V views, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr

from cache_schemas import Commit, EmbeddingStore, Failure, parse_plan
from cache_schemas.embedding_store import (
    ATTRIBUTES_KEY,
    COMMITS,
    EMBEDDING,
    PIXEL_INDEX,
    STATUS,
    VIEW,
    commit_path,
    pixels_path,
    rows_path,
)
from cache_schemas.plan import FILES, FILES_TABLE
from dimefm import storage
from dimefm.arrays import DAMAGED, create_array, digest_arrays, group_attributes, open_array, open_group
from dimefm.commits import make_commit
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.mapped import MappedArray
from dimefm.sources.base import SourceFile
from dimefm.tables import read_table, require_digest, sha256, write_table

_COMMIT_NAME = re.compile(r"(\d{6,})\.json")
_PLANS = 4  # whole plans that are kept
_THREADS = 4  # that read plans


class Store:
    """A store on disk. Cheap to open, whatever its size: nothing but its attributes is read."""

    def __init__(self, path: str) -> None:
        """Open a store. Raises StoreError where there is none, SchemaError where its attributes are not valid."""
        self.path = storage.absolute(path)
        self.group = open_group(self.path)
        attributes = group_attributes(self.group, self.path)
        self.schema = EmbeddingStore.parse(attributes, storage.join(self.path, "zarr.json"))
        for name in self.schema.arrays():
            metadata = f"{name}/zarr.json"
            require_digest(storage.join(self.path, metadata), self.schema.digests.get(metadata), "cache again")
        self._arrays = {name: open_array(self.group, name, spec) for name, spec in self.schema.arrays().items()}
        self._mapped = {name: MappedArray.open(self.path, name, array) for name, array in self._arrays.items()}
        self._seen: set[str] = set()
        self._plan = lru_cache(maxsize=_PLANS)(self._read_plan)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.path,)  # another process opens it anew

    # -- writing ------------------------------------------------------------------------------------------------------

    @staticmethod
    def create(path: str, schema: EmbeddingStore) -> Store:
        """Make the arrays, and last the attributes: until they are there the store counts as not planned.

        Raises StoreError where they cannot be written.
        """
        with storage.writing_to(path):
            group = zarr.open_group(storage.absolute(path), mode="a")
            if ATTRIBUTES_KEY in group.attrs:
                raise OutputExistsError(f"{path} is a store already", remedy="give another place")
            for name, spec in schema.arrays().items():
                chunks = (spec.chunk_rows, *spec.shape[1:])
                create_array(group, name, spec.shape, spec.dtype, chunks, schema.shard_rows)
            names = [*(f"{name}/zarr.json" for name in schema.arrays()), FILES_TABLE]
            places = {name: storage.join(storage.absolute(path), name) for name in names}
            found = {name: sha256(storage.read_bytes(place)) for name, place in places.items() if storage.exists(place)}
            schema = replace(schema, digests={**schema.digests, **found})
            # Written as our other documents are, so that `dimefm verify` knows each byte, whatever zarr's release.
            document = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTES_KEY: schema.to_json()}}
            storage.write_json(storage.join(storage.absolute(path), "zarr.json"), document)
        return Store(path)

    def write_shard(
        self,
        shard: int,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        failures: Sequence[Failure],
        *,
        device: str,
        seconds: float,
        pixels: str | None = None,
    ) -> Commit:
        """Write one whole shard, then its commit. Until the commit is there, the shard counts as not done.

        `arrays` are all that the store has, by name, (N, ...); `pixels` is the digest of the shard's tar. Raises
        StoreError where it cannot be written, as on a full disk: the shards that were committed before are not touched.
        """
        start, stop = self.schema.shard_range(shard)
        path = storage.join(self.path, commit_path(shard))
        with storage.writing_to(self.path):
            storage.remove_file(path)  # of a shard that is written again
            for name, array in self._arrays.items():
                file = storage.join(self.path, self.shard_file(name, shard))
                storage.remove_file(file)  # zarr would read what is in it, where the last shard is not a full one
                array[start:stop] = arrays[name]
                storage.flush(file)
                mapped = self._mapped[name]
                if mapped is not None:
                    mapped.forget()
            commit = make_commit(
                shard,
                start,
                arrays[STATUS],
                failures,
                digest=digest_arrays(*(arrays[name] for name in self._arrays)),
                device=device,
                seconds=seconds,
                plan=self.schema.digests.get(rows_path(shard)),
                pixels=pixels,
            )
            storage.write_json(path, commit.to_json())
        return commit

    # -- progress -----------------------------------------------------------------------------------------------------

    def committed(self) -> set[int]:
        """The shards that are done."""
        names = storage.listing(storage.join(self.path, COMMITS))
        found = {int(match[1]) for name in names if (match := _COMMIT_NAME.fullmatch(name))}
        return {shard for shard in found if shard < self.schema.shards}

    def commit(self, shard: int) -> Commit | None:
        """The commit of a shard, None where it is not done. Raises SchemaError, StoreError for a damaged one."""
        path = storage.join(self.path, commit_path(shard))
        return self._read_commit(shard) if storage.exists(path) else None

    def commits(self) -> Iterator[Commit]:
        """The commits in order of shard. Raises as `commit` does."""
        return map(self._read_commit, sorted(self.committed()))

    def _read_commit(self, shard: int) -> Commit:
        path = storage.join(self.path, commit_path(shard))
        commit = Commit.parse(storage.read_json(path), path)
        if (commit.shard, commit.start, commit.stop) != (shard, *self.schema.shard_range(shard)):
            what = f"{path} is the commit of shard {commit.shard}, rows {commit.start} to {commit.stop - 1}"
            raise StoreError(what, remedy=DAMAGED)
        return commit

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
        """Embeddings of rows start..stop-1, float16 (N, D); of a store of views, their normalised mean. Rows without an
        embedding are zero. Raises StoreError for rows that were never written, or are damaged."""
        return self._one_view(self._read(EMBEDDING, slice(start, stop)))

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings of any rows in any order, as `read` gives them."""
        return self._one_view(self._read(EMBEDDING, rows_N))

    def _one_view(self, embedding: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _mean_view(embedding) if self.schema.views else embedding

    def gather_view(
        self, rows_N: np.ndarray[Any, Any], view_N: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of a store of views: the embedding float16 (N, D) and box int32 (N, 5) of one view of each row."""
        places = np.arange(len(rows_N))
        return self._read(EMBEDDING, rows_N)[places, view_N], self._read(VIEW, rows_N)[places, view_N]

    def embeddings(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings as they are stored, (N, D) or with views (N, V, D)."""
        return self._read(EMBEDDING, rows_N)

    def shard_arrays(self, shard: int) -> dict[str, np.ndarray[Any, Any]]:
        """All arrays of one shard by name, every checksum compared."""
        return {name: self._zarr(name, slice(*self.schema.shard_range(shard))) for name in self._arrays}

    def pixels(self, rows_N: np.ndarray[Any, Any]) -> Iterator[bytes]:
        """The JPEGs of any rows in any order, of a store with pixels; where they are is looked up for all at once.

        Raises StoreError for one that is missing or damaged, OSError where the storage does not answer.
        """
        for row, (start, stop, checksum) in zip(rows_N.tolist(), self._read(PIXEL_INDEX, rows_N).tolist(), strict=True):
            path = storage.join(self.path, pixels_path(row // self.schema.shard_rows))
            try:
                jpeg = storage.read_bytes(path, start, stop - start)
            except FileNotFoundError:
                raise StoreError(f"{path} is missing", remedy=DAMAGED) from None
            if google_crc32c.value(jpeg) != checksum:
                raise StoreError(f"{path}, row {row} is damaged: its checksum does not fit", remedy=DAMAGED)
            yield jpeg

    def status(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Status codes, uint8 (N,)."""
        return self._read(STATUS, slice(start, self.schema.rows if stop is None else stop))

    def _read(self, name: str, rows: slice | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        mapped = self._mapped[name]
        if mapped is None:
            return self._zarr(name, rows)
        return mapped.read(rows.start, rows.stop) if isinstance(rows, slice) else mapped.gather(rows)

    def _zarr(self, name: str, rows: slice | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows through zarr-python, which compares every checksum, but takes a missing file for one full of zeros."""
        array, size = self._arrays[name], self.schema.shard_rows
        found = np.arange(rows.start // size, -(-rows.stop // size)) if isinstance(rows, slice) else rows // size
        shards = np.unique(found).tolist()
        for shard in shards:
            self._require_file(self.shard_file(name, shard))
        try:
            return np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows])
        except ValueError as error:
            where = self.shard_file(name, shards[0]) if len(shards) == 1 else f"a file below {name}/c"
            what = f"{storage.join(self.path, where)} is damaged: its checksum does not fit"
            raise StoreError(what, remedy=DAMAGED) from error

    def shard_file(self, name: str, shard: int) -> str:
        """Where, within the store, the data of an array's shard is."""
        return f"{name}/c/{shard}{'/0' * (self._arrays[name].ndim - 1)}"

    def _require_file(self, name: str) -> None:
        if name not in self._seen:
            path = storage.join(self.path, name)
            if not storage.exists(path):
                raise StoreError(f"{path} is missing", remedy=DAMAGED)
            self._seen.add(name)

    def plan(self, shard: int) -> pa.Table:
        """The plan of one shard: its rows' keys and where they are. Kept for the last few shards asked for."""
        return self._plan(shard, ())

    def _read_plan(self, shard: int, columns: tuple[str, ...]) -> pa.Table:
        path = storage.join(self.path, rows_path(shard))
        repeated = tuple(name for name in columns if name == "file")
        table = read_table(path, self.schema.digests.get(rows_path(shard)), columns, repeated)
        return parse_plan(table, self.schema.kind, *self.schema.shard_range(shard), path, columns)

    def source_files(self) -> pa.Table:
        """The files that the plan was made from, as they were then. Raises StoreError where the table is damaged."""
        return read_table(storage.join(self.path, FILES_TABLE), self.schema.digests.get(FILES_TABLE))

    def entries(self, rows_N: np.ndarray[Any, Any], columns: tuple[str, ...] = ()) -> pa.Table:
        """The plan's entries of rows in ascending order: all of each, or the row and `columns`, which takes a fraction
        of the time. A plan is read as a whole, so rows of many shards are best asked for at once."""
        shards, starts = np.unique(rows_N // self.schema.shard_rows, return_index=True)

        def read(shard: int, rows_M: np.ndarray[Any, Any]) -> pa.Table:
            return self._plan(shard, columns).take(rows_M - shard * self.schema.shard_rows)

        parts = np.split(np.asarray(rows_N, np.int64), starts[1:])
        with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
            table = pa.concat_tables(pool.map(read, shards.tolist(), parts)).combine_chunks()
        return table.add_column(0, "row", pa.array(rows_N, pa.int64())) if columns else table

    def samples(self, rows_N: np.ndarray[Any, Any], columns: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The same of any rows, in the order asked for."""
        if not len(rows_N):
            return []
        ascending_M, place_N = np.unique(rows_N, return_inverse=True)
        found: list[dict[str, Any]] = self.entries(ascending_M, columns).take(place_N).to_pylist()
        return found


def create_store(out: str, schema: EmbeddingStore, digests: Sequence[str], files: Sequence[SourceFile]) -> Store:
    """The store of plans that are written, one a digest: the table of its source's files, and last its attributes."""
    columns = {name: [getattr(file, name) for file in files] for name in FILES.names}
    write_table(storage.join(out, FILES_TABLE), pa.table(columns, schema=FILES))
    plans = {rows_path(shard): digest for shard, digest in enumerate(digests)}
    return Store.create(out, replace(schema, digests=plans))


def require_same_teacher(one: Store, other: Store) -> None:
    """Raises MismatchError unless both stores' embeddings come from the same teacher; precision may differ."""
    differences = one.schema.teacher.differences(other.schema.teacher, ignore=("precision",))
    if differences:
        lines = "".join(f"\n  - teacher.{d}" for d in differences)
        what = f"{one.path} and {other.path} come from different teachers:{lines}"
        raise MismatchError(what, remedy="cache both with the same teacher")


def _mean_view(embedding_NVD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean over views with its norm set to 1 again, float16 (N, D); zero stays zero."""
    mean_ND: np.ndarray[Any, Any] = embedding_NVD.astype(np.float32).mean(axis=1)
    norm_N1 = np.linalg.norm(mean_ND, axis=1, keepdims=True)
    return (mean_ND / np.where(norm_N1 > 0, norm_N1, 1)).astype(np.float16)
