"""The embedding store: one Zarr v3 group per cached source, written a shard at a time, read by row.

Shapes: N rows asked for, V views, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr

from cache_schemas import Commit, EmbeddingStore, Failure, Status, digest_of, parse_plan
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
from cache_schemas.plan import FILES, FILES_TABLE, SourceFile
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.store.commit import make_commit, read_failures, remove_commit, write_commit
from dimefm.store.mapped_array import MappedArray
from dimefm.store.parquet_tables import read_table, require_digest, sha256, write_table
from dimefm.store.ranged_array import RangedArray
from dimefm.store.zarr_arrays import (
    DAMAGED,
    create_array,
    digest_arrays,
    group_attributes,
    open_array,
    open_group,
    reading_zarr,
    write_attributes,
    write_rows,
    zarr_place,
)
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.read_ahead import reading_ahead

_COMMIT_NAME = re.compile(r"(\d{6,})\.json")
_PLANS = 4  # whole plans that are kept
_THREADS = 4  # that read plans
_PART_ROWS = 512  # that are looked at for infinity at once


@dataclass(frozen=True)
class Contents:
    """What is in a store: the digest of each committed shard by its number, and how many rows have an embedding."""

    shards: dict[str, str]
    good: int

    @property
    def digest(self) -> str:
        """Of all embeddings: what was made from a store keeps it, to be told from what belongs to the store now."""
        return digest_of(self.shards)


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
        self._arrays = {
            name: open_array(self.group, self.path, name, spec) for name, spec in self.schema.arrays().items()
        }
        self._direct = {name: open_direct(self.path, name, array) for name, array in self._arrays.items()}
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
            group = zarr.open_group(zarr_place(storage.absolute(path)), mode="a")
            if ATTRIBUTES_KEY in group.attrs:
                raise OutputExistsError(f"{path} is a store already", remedy="give another place")
            for name, spec in schema.arrays().items():
                chunks = (spec.chunk_rows, *spec.shape[1:])
                create_array(group, name, spec.shape, spec.dtype, chunks, schema.shard_rows)
            names = [*(f"{name}/zarr.json" for name in schema.arrays()), FILES_TABLE]
            places = {name: storage.join(storage.absolute(path), name) for name in names}
            found = {name: sha256(storage.read_bytes(place)) for name, place in places.items() if storage.exists(place)}
            schema = replace(schema, digests={**schema.digests, **found})
            require_held(storage.absolute(path))
            write_attributes(storage.absolute(path), schema.arrays(), schema.to_json())
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
        start = self.schema.shard_range(shard)[0]
        self.__dict__.pop("contents", None)
        with storage.writing_to(self.path):
            remove_commit(self.path, shard)  # of a shard that is written again
            for name, array in self._arrays.items():
                file = storage.join(self.path, self.shard_file(name, shard))
                storage.remove_file(file)  # zarr would read what is in it, where the last shard is not a full one
                write_rows(self.path, self.shard_file(name, shard), array, start, arrays[name])
                direct = self._direct[name]
                if direct is not None:
                    direct.forget()
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
            return write_commit(self.path, commit)

    # -- progress -----------------------------------------------------------------------------------------------------

    def committed(self) -> set[int]:
        """The shards that are done."""
        names = storage.listing(storage.join(self.path, COMMITS))
        found = {int(match[1]) for name in names if (match := _COMMIT_NAME.fullmatch(name))}
        return {shard for shard in found if shard < self.schema.shards}

    def commit(self, shard: int) -> Commit | None:
        """The commit of a shard, None where it is not done. Raises SchemaError, StoreError for a damaged one."""
        path = storage.join(self.path, commit_path(shard))
        return self._parse_commit(shard, storage.read_json(path)) if storage.exists(path) else None

    def commits(self) -> Iterator[Commit]:
        """The commits in order of shard. Raises as `commit` does."""
        shards = sorted(self.committed())
        paths = [storage.join(self.path, commit_path(shard)) for shard in shards]
        return map(self._parse_commit, shards, reading_ahead(storage.read_json, paths, self.path))

    def failures(self, commit: Commit) -> Iterator[Failure]:
        """The rows of a finished shard that have no embedding, with why. Raises StoreError where they are damaged."""
        return read_failures(self.path, commit)

    @cached_property
    def contents(self) -> Contents:
        """What the commits say, as they were when it was first asked for. Raises as `commit` does."""
        shards, good = {}, 0
        for commit in self.commits():
            shards[str(commit.shard)] = commit.digest
            good += commit.counts.get(Status.OK.name, 0)
        return Contents(shards, good)

    def _parse_commit(self, shard: int, document: object) -> Commit:
        path = storage.join(self.path, commit_path(shard))
        commit = Commit.parse(document, path)
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
        """Embeddings of rows start..stop-1, in the store's type (N, D); of a store of views, their normalised mean.
        Rows without an embedding are zero. Raises StoreError for rows that were never written, or are damaged."""
        return self._one_view(self._read(EMBEDDING, slice(start, stop)))

    def valid_rows(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows among start..stop-1 whose embedding is finite and not zero, as that of a failed row is: their
        numbers int64 (N,) and their embeddings in the store's type (N, D)."""
        embedding_ND = self.read(start, stop)
        good_N = _finite_and_not_zero(embedding_ND)
        if good_N.all():
            return np.arange(start, stop), embedding_ND
        return np.flatnonzero(good_N) + start, embedding_ND[good_N]

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings of any rows in any order, as `read` gives them."""
        return self._one_view(self._read(EMBEDDING, rows_N))

    def _one_view(self, embedding: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _mean_view(embedding) if self.schema.views else embedding

    def gather_view(
        self, rows_N: np.ndarray[Any, Any], view_N: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of a store of views: the embedding (N, D) and box int32 (N, 5) of one view of each row."""
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
        index_N3 = self._read(PIXEL_INDEX, rows_N)
        return reading_ahead(self._jpeg, list(zip(rows_N.tolist(), index_N3.tolist(), strict=True)), self.path)

    def _jpeg(self, place: tuple[int, list[int]]) -> bytes:
        row, (start, stop, checksum) = place
        path = storage.join(self.path, pixels_path(row // self.schema.shard_rows))
        try:
            jpeg = storage.read_bytes(path, start, stop - start)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing", remedy=DAMAGED) from None
        if google_crc32c.value(jpeg) != checksum:
            raise StoreError(f"{path}, row {row} is damaged: its checksum does not fit", remedy=DAMAGED)
        return jpeg

    def status(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Status codes, uint8 (N,)."""
        return self._read(STATUS, slice(start, self.schema.rows if stop is None else stop))

    def _read(self, name: str, rows: slice | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        direct = self._direct[name]
        if direct is None:
            return self._zarr(name, rows)
        return direct.read(rows.start, rows.stop) if isinstance(rows, slice) else direct.gather(rows)

    @property
    def by_chunks(self) -> bool:
        """Whether rows had better be asked for by whole chunks: at a URL, of embeddings that a process cannot keep."""
        return by_chunks(self.path, self._direct[EMBEDDING])

    def _zarr(self, name: str, rows: slice | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows through zarr-python, which compares every checksum, but takes a missing file for one full of zeros."""
        array, size = self._arrays[name], self.schema.shard_rows
        found = np.arange(rows.start // size, -(-rows.stop // size)) if isinstance(rows, slice) else rows // size
        shards = np.unique(found).tolist()
        for shard in shards:
            self._require_file(self.shard_file(name, shard))
        try:
            with reading_zarr(storage.join(self.path, name)):
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


def open_direct(store: str, name: str, array: Any) -> MappedArray | RangedArray | None:
    """A reader of array `name` that goes around zarr: by memory maps, of a store at a URL by byte ranges; None where
    the array is not stored as we do."""
    return MappedArray.open(store, name, array) or RangedArray.open(store, name, array)


def by_chunks(store: str, direct: MappedArray | RangedArray | None) -> bool:
    """See Store.by_chunks: of an array of a store, by what `open_direct` gives for it."""
    return storage.is_url(store) and not (isinstance(direct, RangedArray) and direct.fits)


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


def require_same_data(what: str, made_from: str | None, store: Store, *, remedy: str) -> None:
    """Raises MismatchError unless `what` was made from the embeddings that the store has now, by their digest; None, of
    what was made before it was kept, is not compared."""
    if made_from is not None and made_from != store.contents.digest:
        what += f" from other embeddings of {store.path} than it has now: rows of it were encoded again since then"
        raise MismatchError(what, remedy=remedy)


def _mean_view(embedding_NVD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean over views with its norm set to 1 again, in their type (N, D); zero stays zero."""
    mean_ND: np.ndarray[Any, Any] = embedding_NVD.astype(np.float32).mean(axis=1)
    norm_N1 = np.linalg.norm(mean_ND, axis=1, keepdims=True)
    return (mean_ND / np.where(norm_N1 > 0, norm_N1, 1)).astype(embedding_NVD.dtype)


def _finite_and_not_zero(embedding_ND: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which rows are finite and not all zero, bool (N,).

    Without their sign, the bits of a float grow with it, and those of infinity are below those of NaN. NumPy's own
    functions for float16 are ten times slower. A part at a time, whose copy stays in the processor's cache.
    """
    unsigned = np.dtype(f"u{embedding_ND.itemsize}")
    without_sign, infinite = np.iinfo(unsigned).max >> 1, np.array(np.inf, embedding_ND.dtype).view(unsigned)
    bits_ND = embedding_ND.view(unsigned)
    parts = (bits_ND[at : at + _PART_ROWS] for at in range(0, len(bits_ND) or 1, _PART_ROWS))
    largest_N = np.concatenate([(part_ND & without_sign).max(axis=1) for part_ND in parts])
    return (largest_N > 0) & (largest_N < infinite)
