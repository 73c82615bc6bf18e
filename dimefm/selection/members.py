"""The candidates of each shard in the order of their clusters, on disk.

To compare the members of a cluster, all of them are needed at once, and they lie anywhere in the store. Read from
there, each would be a read of its own of a few hundred bytes, for which the checksum of a chunk a thousand times as
large is compared. So each shard is copied in the order of its clusters: then a cluster is one piece of each file.

    offset_1K  int32 (K + 1,): where each cluster begins among the candidates of the shard, and the last ends
    rank_N     int32 (N,): their ranks among all candidates, ascending within a cluster
    row_N      int32 (N,): their rows in the store
    N embeddings, in the store's type (N, D), if they are to be compared

Shapes: S shards, K clusters, N candidates of a shard or of some clusters, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from dimefm.errors import StoreError
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.read_ahead import reading_ahead

RANKS, CENTRES, MEMBERS = "ranks", "centres", "members"
_BLOCK = 8192
_MOST_HELD = 1 << 20  # embeddings: with 768 dimensions 1.6 GB


def members_path(folder: str, shard: int) -> str:
    """The file of a shard."""
    return storage.join(folder, f"{MEMBERS}/{shard:06d}")


def read_rows(store: Store, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Embeddings of ascending rows, in the store's type (N, D). A shard of which most chunks are asked for is read as a
    whole: a memory map would count as this process's memory."""
    schema = store.schema
    out = np.empty((len(rows_N), schema.dim), schema.dtype)
    shards, firsts = np.unique(rows_N // schema.shard_rows, return_index=True)
    for shard, first, last in zip(shards.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(rows_N)], strict=True):
        (start, stop), mine_N = schema.shard_range(shard), rows_N[first:last]
        chunks = len(np.unique(mine_N // schema.chunk_rows))
        if 2 * chunks * schema.chunk_rows >= stop - start:
            out[first:last] = store.read(start, stop)[mine_N - start]
        else:
            out[first:last] = store.gather(mine_N)
    return out


def require_room(folder: str, needed: int) -> None:
    """Raises StoreError where a local folder has no room for copies of this many bytes."""
    free = needed if storage.is_url(folder) else shutil.disk_usage(folder).free
    if free < needed:
        what = (
            f"{folder}: --dedup copies {needed / 1e9:,.1f} GB there until it is done, and {free / 1e9:,.1f} GB are free"
        )
        remedy = "make room, or let fewer go on, by a smaller --pool or --top; what was finished is kept"
        raise StoreError(what, remedy=remedy)


def write_members(
    folder: str,
    shard: int,
    clusters: int,
    label_N: np.ndarray[Any, Any],
    rank_N: np.ndarray[Any, Any],
    rows_N: np.ndarray[Any, Any],
    half_ND: np.ndarray[Any, Any] | None,
) -> None:
    """Write the members of a shard. Raises StoreError where they cannot be written."""
    order_N = np.lexsort((rank_N, label_N))
    counts_K = np.bincount(label_N, minlength=clusters)
    with storage.writing_to(folder), storage.writing_atomically(members_path(folder, shard)) as file:
        for values in (np.r_[0, np.cumsum(counts_K)], rank_N[order_N], rows_N[order_N]):
            file.write(values.astype("<i4").tobytes())
        if half_ND is not None:
            for at in range(0, len(order_N), _BLOCK):
                file.write(half_ND[order_N[at : at + _BLOCK]].tobytes())


def label_members(folder: str, shard: int, clusters: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The ranks of the candidates of a shard, and the cluster of each, int32 (N,)."""
    offset_1K = _offsets(folder, shard, clusters)
    rank_N = _ints(folder, shard, len(offset_1K), int(offset_1K[-1]))
    return rank_N, np.repeat(np.arange(clusters, dtype=np.int32), np.diff(offset_1K))


def _offsets(folder: str, shard: int, clusters: int) -> np.ndarray[Any, Any]:
    return _ints(folder, shard, 0, clusters + 1)


def _ints(folder: str, shard: int, first: int, count: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(storage.read_bytes(members_path(folder, shard), 4 * first, 4 * count), "<i4")


class MembersOfClusters:
    """The members of some shards, by cluster."""

    def __init__(self, folder: str, shards: Sequence[int], clusters: int, store: Store) -> None:
        self._folder, self._shards, self._store = folder, list(shards), store
        found = reading_ahead(lambda shard: _offsets(folder, shard, clusters), self._shards, folder)
        self._offset_S1K = np.stack(list(found))

    def read(self, first: int, last: int) -> Members:
        """The members of the clusters first..last-1."""
        count = int((self._offset_S1K[:, last] - self._offset_S1K[:, first]).sum())
        schema, bounds = self._store.schema, np.diff(self._offset_S1K[:, first : last + 1], axis=1)
        label_N = np.concatenate([np.repeat(np.arange(first, last, dtype=np.int32), of_shard) for of_shard in bounds])
        rank_N, row_N = np.empty(count, np.int32), np.empty(count, np.int32)
        half_ND = np.empty((count, schema.dim), schema.dtype) if count <= _MOST_HELD else None
        at = 0
        parts = range(len(self._shards))
        for ranks, rows, vectors in reading_ahead(lambda i: self._part(i, first, last, half_ND), parts, self._folder):
            here = slice(at, at + len(ranks))
            rank_N[here], row_N[here], at = ranks, rows, here.stop
            if half_ND is not None:
                half_ND[here] = vectors
        return Members(self._store, label_N, rank_N, row_N, half_ND)

    def _part(self, i: int, first: int, last: int, half: object) -> tuple[np.ndarray[Any, Any], ...]:
        """Ranks, rows and, unless `half` is None, embeddings of these clusters in a shard."""
        shard, offset_1K, schema = self._shards[i], self._offset_S1K[i], self._store.schema
        start, stop, every = int(offset_1K[first]), int(offset_1K[last]), int(offset_1K[-1])
        rank_N = _ints(self._folder, shard, len(offset_1K) + start, stop - start)
        row_N = _ints(self._folder, shard, len(offset_1K) + every + start, stop - start)
        if half is None:
            return rank_N, row_N, rank_N
        width, head = schema.dim * schema.item_bytes, 4 * (len(offset_1K) + 2 * every)
        data = storage.read_bytes(members_path(self._folder, shard), head + start * width, (stop - start) * width)
        return rank_N, row_N, np.frombuffer(data, schema.dtype).reshape(-1, schema.dim)


class Members:
    """Candidates of some clusters, by cluster and then best first: the cluster, rank and row of each, int32 (N,)."""

    def __init__(
        self,
        store: Store,
        label_N: np.ndarray[Any, Any],
        rank_N: np.ndarray[Any, Any],
        row_N: np.ndarray[Any, Any],
        half_ND: np.ndarray[Any, Any] | None,
    ) -> None:
        self._store, self._half_ND, self._order_N = store, half_ND, np.lexsort((rank_N, label_N))
        self.label_N, self.rank_N, self.row_N = (values_N[self._order_N] for values_N in (label_N, rank_N, row_N))

    def embeddings(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The embeddings of those at these places, in the store's type; from the store where there are too many to
        hold, as in a single cluster of a million."""
        if self._half_ND is None:
            return self._store.gather(self.row_N[places])
        found_ND: np.ndarray[Any, Any] = self._half_ND[self._order_N[places]]
        return found_ND
