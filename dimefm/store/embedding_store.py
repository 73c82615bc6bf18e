"""The embedding store: one Zarr v3 group per cached source, written a shard at a time, read by row.

A store of views may hold more of them than it was made with: each addition is a store of its own within it
(store.added_views), which is read with it once it is complete.

Shapes: N rows asked for, M of them without repeats, V views, P numbers of a view, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import Commit, EmbeddingStore, Failure, Status, digest_of
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
from dimefm.store.added_views import complete_additions, parent_path
from dimefm.store.commit import make_commit, read_failures, remove_commit, write_commit
from dimefm.store.parquet_tables import require_digest, sha256, write_table
from dimefm.store.pixel_reader import PixelReader
from dimefm.store.plan_reader import PlanReader
from dimefm.store.stored_array import Rows, StoredArray
from dimefm.store.zarr_arrays import (
    DAMAGED,
    create_array,
    digest_arrays,
    group_attributes,
    new_group,
    open_array,
    open_group,
    write_attributes,
)
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.read_ahead import reading_ahead

_COMMIT_NAME = re.compile(r"(\d{6,})\.json")
_PART_ROWS = 512  # that are looked at for infinity at once


@dataclass(frozen=True)
class Contents:
    """What is in a store: the digest of each committed shard, by its number, and how many rows have an embedding."""

    shards: dict[str, str]
    good: int

    @property
    def digest(self) -> str:
        """The digest of all embeddings. What is made from a store records it, and so is recognised as out of date when
        rows are encoded again."""
        return digest_of(self.shards)


class Store:
    """An embedding store on disk. Cheap to open, whatever its size: only its attributes are read."""

    def __init__(self, path: str, *, cached: bool = True, additions: int | None = None) -> None:
        """Open the store at `path`. One at a URL is read through the cache of this machine where there is one
        (system.file_cache), unless it is to be read but once: `cached` is then False. `additions`: how many additions
        of views are read with it, 0 for the store as it was made, as all need that write to it; by default those that
        are complete. Raises StoreError where there is none, SchemaError for attributes that are not valid."""
        self.path, self.cached = storage.absolute(path), cached
        self.group = open_group(self.path)
        attributes = group_attributes(self.group, self.path)
        self.schema = EmbeddingStore.parse(attributes, storage.join(self.path, "zarr.json"))
        for name in self.schema.arrays():
            metadata = f"{name}/zarr.json"
            require_digest(storage.join(self.path, metadata), self.schema.digests.get(metadata), "cache again")
        self._arrays = {
            name: StoredArray(
                self.path, name, open_array(self.group, self.path, name, spec), self.schema.shard_rows,
                version=self._version if cached else None,
            )
            for name, spec in self.schema.arrays().items()
        }  # fmt: skip
        self._plans = PlanReader(parent_path(self.path, self.schema), self.schema)
        self._pixels = PixelReader(self.path, self.schema, self._version)
        self.made = self.schema
        """The attributes as they were written: without the views that were added."""
        self.additions = complete_additions(self, additions)
        if self.additions and self.schema.views:
            count = sum(store.made.views.count for store in (self, *self.additions) if store.made.views)
            self.schema = replace(self.schema, views=replace(self.schema.views, count=count))

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        again = partial(Store, cached=self.cached, additions=len(self.additions))
        return again, (self.path,)  # another process opens it again

    def again(self) -> Store:
        """See `opened`."""
        found = Store(self.path, additions=len(self.additions))
        for mine, theirs in zip((found, *found.additions), (self, *self.additions), strict=True):
            for name in ("contents", "_own_contents"):
                if name in theirs.__dict__:
                    mine.__dict__[name] = theirs.__dict__[name]
        return found

    # -- writing ------------------------------------------------------------------------------------------------------

    @staticmethod
    def create(path: str, schema: EmbeddingStore) -> Store:
        """Make the arrays, then the attributes: until these exist, the store counts as not planned. Raises StoreError
        where they cannot be written."""
        with storage.writing_to(path):
            group = new_group(storage.absolute(path))
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
        """Write one whole shard, then its commit. Until the commit exists, the shard counts as not done.

        `arrays` are all arrays of the store, by name, (N, ...); `pixels` is the digest of the shard's tar. Raises
        StoreError where it cannot be written, as on a full disk; shards that were committed before are not touched.
        """
        start = self.schema.shard_range(shard)[0]
        for name in ("contents", "_own_contents"):
            self.__dict__.pop(name, None)
        with storage.writing_to(self.path):
            remove_commit(self.path, shard)  # the shard may be written again
            for name, array in self._arrays.items():
                array.write(shard, arrays[name])
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

    @property
    def parts(self) -> tuple[Store, ...]:
        """The stores that this one consists of: itself, or those of a `joined_store.JoinedStore`."""
        return (self,)

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

    def failures_in(self, shard: int) -> dict[int, Failure]:
        """By row, why it has no embedding: the first reason, of the store itself and what was added to it. Raises as
        `commit` and `failures` do."""
        found: dict[int, Failure] = {}
        for store in (self, *self.additions):
            if commit := store.commit(shard):
                for failure in store.failures(commit):
                    found.setdefault(failure.row, failure)
        return found

    @cached_property
    def contents(self) -> Contents:
        """What the commits say; read once, when it is first asked for. Raises as `commit` does."""
        if not self.additions:
            return self._own_contents
        parts = [self._own_contents.shards, *(each.contents.shards for each in self.additions)]
        shards = {shard: digest_of([part[shard] for part in parts]) for shard in parts[0]}
        ranges = (self.schema.shard_range(int(shard)) for shard in shards)
        return Contents(shards, sum(int((self.status(*each) == Status.OK).sum()) for each in ranges))

    @cached_property
    def _own_contents(self) -> Contents:
        shards, good = {}, 0
        for commit in self.commits():
            shards[str(commit.shard)] = commit.digest
            good += commit.counts.get(Status.OK.name, 0)
        return Contents(shards, good)

    def _version(self, shard: int) -> str:
        """What is in a shard, for a cache of it: rows that are encoded again have another digest."""
        return self._own_contents.shards[str(shard)]

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
        """Raises MismatchError for a store of the other kind: images in place of texts, or the reverse."""
        if self.schema.kind != kind:
            what = f"{self.path} holds {self.schema.kind} embeddings where {kind} embeddings belong"
            raise MismatchError(what, remedy="check whether two stores were swapped")

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Embeddings of rows start..stop-1, in the store's type (N, D); in a store of views, the normalised mean of the
        views. Rows without an embedding are zero. Raises StoreError for rows that are damaged or not written."""
        return self._one_view(self._all_views(EMBEDDING, slice(start, stop)))

    def valid_rows(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows of start..stop-1 that have an embedding, finite and not zero: their numbers int64 (N,), and their
        embeddings in the store's type (N, D)."""
        embedding_ND = self.read(start, stop)
        good_N = _finite_and_not_zero(embedding_ND)
        if good_N.all():
            return np.arange(start, stop), embedding_ND
        return np.flatnonzero(good_N) + start, embedding_ND[good_N]

    def gather(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings of any rows in any order, as `read` returns them."""
        return self._one_view(self._all_views(EMBEDDING, rows_N))

    def _all_views(self, name: str, rows: Rows) -> np.ndarray[Any, Any]:
        """Some rows of an array, with the views that were added."""
        parts = [store._arrays[name].read(rows) for store in (self, *self.additions)]
        return np.concatenate(parts, axis=1) if self.additions else parts[0]

    def _one_view(self, embedding: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _mean_view(embedding) if self.schema.views else embedding

    def gather_view(
        self, rows_N: np.ndarray[Any, Any], view_N: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """In a store of views: the embedding (N, D) and the numbers int32 (N, P) of one view of each row."""
        return self._one_of(EMBEDDING, rows_N, view_N), self._one_of(VIEW, rows_N, view_N)

    def _one_of(self, name: str, rows_N: np.ndarray[Any, Any], view_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One view of each row from an array (N, V, ...)."""
        spec = self.made.arrays()[name]
        found = np.empty((len(rows_N), *spec.shape[2:]), spec.dtype)
        for store in (self, *self.additions):
            views = store.made.views
            assert views is not None
            first = views.first
            (place_M,) = np.nonzero((first <= view_N) & (view_N < views.end))
            if len(place_M):
                rows_MV = store._arrays[name].read(rows_N[place_M])
                found[place_M] = rows_MV[np.arange(len(place_M)), view_N[place_M] - first]
        return found

    def embeddings(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embeddings as stored, (N, D), or with views (N, V, D)."""
        return self._all_views(EMBEDDING, rows_N)

    def views(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """In a store of views: their numbers, int32 (N, V, P)."""
        return self._all_views(VIEW, rows_N)

    def shard_arrays(self, shard: int) -> dict[str, np.ndarray[Any, Any]]:
        """All arrays of one shard by name, every checksum compared; without the views that were added."""
        return {
            name: array.read_by_zarr(slice(*self.schema.shard_range(shard))) for name, array in self._arrays.items()
        }

    def pixels(self, rows_N: np.ndarray[Any, Any]) -> Iterator[bytes]:
        """In a store with pixels: the JPEGs of any rows in any order; their places are looked up for all at once.
        Raises StoreError for one that is missing or damaged, OSError where the storage does not answer."""
        index_N3 = self._arrays[PIXEL_INDEX].read(rows_N)
        return self._pixels.jpegs(rows_N, index_N3)

    def pixel_places(self, rows_N: np.ndarray[Any, Any]) -> Iterator[tuple[str, int, int]]:
        """In a store with pixels: for each row the tar with its JPEG, where that begins, and how many bytes it has."""
        index_N3 = self._arrays[PIXEL_INDEX].read(rows_N)
        for row, (begin, end, _) in zip(rows_N.tolist(), index_N3.tolist(), strict=True):
            yield storage.join(self.path, pixels_path(row // self.schema.shard_rows)), begin, end - begin

    def fetch(self, rows_N: np.ndarray[Any, Any], *, pixels: bool = False) -> None:
        """Bring the chunks of some rows into the cache of this machine, if the store is read through one: embeddings,
        and with `pixels` all that training reads of them."""
        names = [
            name for name in (EMBEDDING, VIEW, PIXEL_INDEX) if name in self._arrays and (pixels or name == EMBEDDING)
        ]
        for store in (self, *self.additions):
            for name in names:
                if name in store._arrays:
                    store._arrays[name].fetch(rows_N)
        if pixels and self.schema.pixels:
            self._pixels.fetch(rows_N, self._arrays[PIXEL_INDEX].read(rows_N))

    def status(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Status codes, uint8 (N,). A row has an embedding if it has one in each of its views."""
        rows = slice(start, self.schema.rows if stop is None else stop)
        status_N = self._arrays[STATUS].read(rows)
        for store in self.additions:
            status_N = np.where(status_N == Status.OK, store._arrays[STATUS].read(rows), status_N)
        return status_N

    @property
    def by_chunks(self) -> bool:
        """Whether it is better to ask for embeddings by whole chunks: at a URL, of more than a process can keep."""
        return self._arrays[EMBEDDING].by_chunks

    def shard_file(self, name: str, shard: int) -> str:
        """The file of a shard of an array, within the store."""
        return self._arrays[name].file(shard)

    def plan(self, shard: int) -> pa.Table:
        """The plan of one shard: its rows' keys, and where they are. Kept for the last few shards asked for."""
        return self._plans.shard(shard)

    def source_files(self) -> pa.Table:
        """The files that the plan was made from, as they were then. Raises StoreError where the table is damaged."""
        return self._plans.source_files()

    def entries(self, rows_N: np.ndarray[Any, Any], columns: tuple[str, ...] = ()) -> pa.Table:
        """The plan's entries of rows in ascending order: whole, or the row and `columns` alone, which takes a fraction
        of the time. Plans are read as a whole, so it is best to ask for rows of many shards at once."""
        return self._plans.entries(rows_N, columns)

    def name_of(self, row: int) -> str:
        """A row in words, for messages."""
        return f"row {row}"

    def samples(self, rows_N: np.ndarray[Any, Any], columns: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """`entries` of any rows, in the order asked for, as dictionaries."""
        if not len(rows_N):
            return []
        ascending_M, place_N = np.unique(rows_N, return_inverse=True)
        found: list[dict[str, Any]] = self.entries(ascending_M, columns).take(place_N).to_pylist()
        return found


def opened(store: Store | str) -> Store:
    """A store, opened in this process: connections of the one that it was forked from cannot be shared. What that one
    has read of the commits is not read again."""
    return Store(store) if isinstance(store, str) else store.again()


def create_store(out: str, schema: EmbeddingStore, digests: Sequence[str], files: Sequence[SourceFile]) -> Store:
    """Make the store of plans that are written already, of which these are the digests: write the table of its source's
    files, then create the arrays and the attributes."""
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
    """Raises MismatchError unless `what` was made from the embeddings that the store has now. `made_from` is the digest
    that it recorded; None, in files of older releases, is not compared."""
    if made_from is not None and made_from != store.contents.digest:
        what += f" from other embeddings of {store.path} than it has now: rows of it were encoded again since then"
        raise MismatchError(what, remedy=remedy)


def _mean_view(embedding_NVD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean over views, normalised again, in their type (N, D); zero stays zero."""
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
