"""Several image stores of one teacher, read as one: row r of the second is row r + the rows of the first, and so on.

Shapes: N rows asked for, V views, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import EmbeddingStore, digest_of
from dimefm.errors import AbsentError, MismatchError
from dimefm.store.embedding_store import Contents, Store, require_same_teacher
from dimefm.store.output_folder import differing

_Rows = np.ndarray[Any, Any]


class JoinedStore(Store):
    """Finished stores behind the reading side of a `Store`; there is nothing to be written.

    `weights` say how often the rows of each store are drawn, beside a row of weight 1.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float] = ()) -> None:
        """Raises MismatchError for stores that are not alike (of another teacher, other views, or with pixels only in
        some), and for one that is named twice."""
        self._stores, self.weights = tuple(stores), tuple(weights) or (1.0,) * len(stores)
        paths = [store.path for store in self._stores]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise MismatchError(f"{twice} is named twice", remedy="name it once, with a weight: --image-weights")
        for other in self._stores[1:]:
            require_same_teacher(self._stores[0], other)
            _require_alike(self._stores[0], other)
        self.path = "::".join(paths)
        self._starts = np.cumsum([0, *(store.schema.rows for store in self._stores)])
        self.schema = _joined_schema([store.schema for store in self._stores])

    def __reduce__(self) -> tuple[Callable[..., JoinedStore], tuple[Any, ...]]:
        return JoinedStore, (self._stores, self.weights)

    def again(self) -> JoinedStore:
        """As of a Store."""
        return JoinedStore([store.again() for store in self._stores], self.weights)

    @property
    def parts(self) -> tuple[Store, ...]:
        """The stores that are joined."""
        return self._stores

    def start(self, part: int) -> int:
        """The row here that is the first of a part."""
        return int(self._starts[part])

    @property
    def shares(self) -> _Rows:
        """The share that each part has of all images that are drawn, float64: its rows with an embedding, times its
        weight."""
        weighted = np.array([store.contents.good for store in self._stores]) * np.array(self.weights)
        shares: _Rows = weighted / weighted.sum()
        return shares

    @cached_property
    def contents(self) -> Contents:
        """The digest of each part, by its number, and how many rows have an embedding."""
        found = [store.contents for store in self._stores]
        digests = {str(number): contents.digest for number, contents in enumerate(found)}
        return Contents(digests, sum(contents.good for contents in found))

    @property
    def by_chunks(self) -> bool:
        """As of a Store, of any part."""
        return any(store.by_chunks for store in self._stores)

    def read(self, start: int, stop: int) -> _Rows:
        """As of a Store."""
        return self._spans(start, stop, lambda store, first, last: store.read(first, last))

    def status(self, start: int = 0, stop: int | None = None) -> _Rows:
        """As of a Store."""
        stop = self.schema.rows if stop is None else stop
        return self._spans(start, stop, lambda store, first, last: store.status(first, last))

    def gather(self, rows_N: _Rows) -> _Rows:
        """As of a Store."""
        (found,) = self._gathered(rows_N, lambda store, rows, _: (store.gather(rows),))
        return found

    def embeddings(self, rows_N: _Rows) -> _Rows:
        """As of a Store."""
        (found,) = self._gathered(rows_N, lambda store, rows, _: (store.embeddings(rows),))
        return found

    def gather_view(self, rows_N: _Rows, view_N: _Rows) -> tuple[_Rows, _Rows]:
        """As of a Store."""
        embedding_ND, numbers_NP = self._gathered(rows_N, lambda store, rows, at: store.gather_view(rows, view_N[at]))
        if self.schema.views and self.schema.views.mixup:  # the row that a view is mixed with is one of its own part
            other_N = numbers_NP[:, self.schema.views.alone]
            mixed_N = other_N >= 0
            other_N[mixed_N] += self._starts[self._part(rows_N[mixed_N])].astype(other_N.dtype)
        return embedding_ND, numbers_NP

    def pixels(self, rows_N: _Rows) -> Iterator[bytes]:
        """As of a Store."""
        part_N = self._part(rows_N)
        readers = {part: self._stores[part].pixels(self._own(rows_N[part_N == part], part)) for part in set(part_N)}
        for part in part_N:
            yield next(readers[part])

    def entries(self, rows_N: _Rows, columns: tuple[str, ...] = ()) -> pa.Table:
        """As of a Store, but that "row" is the row within its part."""
        part_N = self._part(rows_N)
        parts = np.unique(part_N).tolist()
        return pa.concat_tables(
            [self._stores[part].entries(self._own(rows_N[part_N == part], part), columns) for part in parts]
        )

    def name_of(self, row: int) -> str:
        """As of a Store, with the part that it is in."""
        part = int(self._part(np.array([row]))[0])
        return f"{self._stores[part].name_of(row - self.start(part))} of {self._stores[part].path}"

    def fetch(self, rows_N: _Rows, *, pixels: bool = False) -> None:
        """As of a Store."""
        part_N = self._part(rows_N)
        for part in np.unique(part_N).tolist():
            self._stores[part].fetch(self._own(rows_N[part_N == part], part), pixels=pixels)

    def _part(self, rows_N: _Rows) -> _Rows:
        return np.searchsorted(self._starts, rows_N, side="right") - 1

    def _own(self, rows_N: _Rows, part: int) -> _Rows:
        """The rows of a part, as it numbers them."""
        own_N: _Rows = rows_N - self._starts[part]
        return own_N

    def _spans(self, start: int, stop: int, read: Callable[[Store, int, int], _Rows]) -> _Rows:
        """What `read` gives of rows start..stop-1, part by part."""
        found = []
        for part, store in enumerate(self._stores):
            first, last = max(start, self.start(part)), min(stop, self.start(part + 1))
            if first < last:
                found.append(read(store, first - self.start(part), last - self.start(part)))
        return np.concatenate(found) if found else read(self._stores[0], 0, 0)

    def _gathered(self, rows_N: _Rows, read: Callable[[Store, _Rows, _Rows], tuple[_Rows, ...]]) -> list[_Rows]:
        """The arrays that `read` gives for rows of each part, which are at the places that it gets, put in order."""
        part_N = self._part(rows_N)
        places = [np.flatnonzero(part_N == part) for part in range(len(self._stores))]
        read_N = [
            read(self._stores[part], self._own(rows_N[at], part), at) for part, at in enumerate(places) if len(at)
        ]
        if not read_N:
            return list(read(self._stores[0], rows_N, rows_N))
        back_N = np.argsort(np.concatenate([at for at in places if len(at)]))
        return [np.concatenate(arrays)[back_N] for arrays in zip(*read_N, strict=True)]


def open_images(paths: str, weights: Sequence[float] = ()) -> Store:
    """The store at a path, or the stores at several, with ``::`` between them, as one. Raises as `Store` does,
    AbsentError where there is no path beside a ``::``, and MismatchError for stores that are not alike."""
    named = paths.split("::")
    if not all(named):
        raise AbsentError(f"{paths!r} has no store on one side of ::", remedy="name stores as A.zarr::B.zarr")
    stores = [Store(path) for path in named]
    return stores[0] if len(stores) == 1 else JoinedStore(stores, weights)


def _require_alike(one: Store, other: Store) -> None:
    mine, theirs = _facts(one), _facts(other)
    differences = differing(*({name: facts[name] for name in mine.keys() & theirs.keys()} for facts in (mine, theirs)))
    if differences:
        values = "; ".join(f"{name}: {differences[name]}" for name in mine if name in differences)
        what = f"{one.path} and {other.path} cannot be trained on together: {values}"
        raise MismatchError(what, remedy="cache both with the same options")


def _facts(store: Store) -> dict[str, object]:
    """What stores that are joined must have in common, by name: their number of views, and what these are."""
    views, schema = store.schema.views, store.schema
    facts = {"views": views.count if views else None, "pixels": bool(schema.pixels), "dtype": schema.dtype}
    return facts | ({f"views.{name}": value for name, value in vars(views).items() if name != "count"} if views else {})


def _joined_schema(schemas: Sequence[EmbeddingStore]) -> EmbeddingStore:
    """What is said of all together. Its shards are spans of rows alone; its identity comes from those of the parts."""
    first, sources = schemas[0], [schema.source for schema in schemas]
    source = replace(
        first.source,
        arguments=tuple(argument for source in sources for argument in source.arguments),
        files=sum(source.files for source in sources),
        bytes=sum(source.bytes for source in sources),
        digest=digest_of([[schema.identity, schema.chunk_rows] for schema in schemas]),
    )
    return replace(first, rows=sum(schema.rows for schema in schemas), source=source, digests={})
