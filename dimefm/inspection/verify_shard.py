"""What `dimefm verify` checks in one shard of a store: every byte, its plan against its commit, and the norm of its
embeddings. A shard is checked alone, in this process or in another, and what is found in it is small.

Shapes: N rows of a shard, V views, D embedding width.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cache_schemas import Commit, EmbeddingStore, SchemaError, Status
from cache_schemas.embedding_store import EMBEDDING, STATUS, commit_path, pixels_path, rows_path
from dimefm.caching.repeats import hashes_of
from dimefm.errors import DimefmError, StoreError, UnreadableError
from dimefm.store.embedding_store import Store
from dimefm.store.reopen import reopen
from dimefm.store.zarr_arrays import digest_arrays
from dimefm.system import storage
from dimefm.system.shard_work import Seat

_NORM_OFF = 2e-3  # how far rounding to float16 may move the norm of a unit vector
_BLOCK = 512  # rows whose norm is computed at a time, so that they stay in the processor's cache


@dataclass
class ShardFindings:
    """What was found in a shard. `problems`: what is wrong with its data, so that it must be written again. `fault`:
    what is wrong with its plan, which writing it again does not mend. `key_hashes`: 64-bit hashes of the keys of its
    images, for the store's count of repeated ones."""

    problems: list[str] = field(default_factory=list)
    fault: str | None = None
    key_hashes: bytes = b""


def worker_bytes(schema: EmbeddingStore) -> int:
    """The memory of a worker that checks shards: as measured, its libraries and 3.3 times the arrays of a shard."""
    return 100 * 10**6 + 10 * schema.shard_bytes // 3


@dataclass(frozen=True)
class CheckShards:
    """The check of a store's shards, as a `system.shard_work.ShardWork`."""

    store: str

    def open(self, seat: Seat) -> Callable[[int], ShardFindings]:
        """Raises UnreadableError where the store is not there, as on a machine without the mount: otherwise every shard
        would be called bad."""
        return partial(check_shard, reopen(self.store, additions=0))

    def name(self, unit: int) -> str:
        """The shard in messages."""
        return f"shard {unit}"


def check_shard(store: Store, shard: int) -> ShardFindings:
    """Read and check one shard. Raises UnreadableError where the storage does not answer."""
    found = ShardFindings()
    with answering(store):
        try:
            keys = store.plan(shard)["key"]
            if store.schema.kind == "image":
                found.key_hashes = hashes_of(keys).tobytes()
        except (OSError, StoreError, SchemaError) as error:
            found.fault = _describe_damage(store, error)
        found.problems = _check_data(store, shard)
    return found


@contextmanager
def answering(store: Store) -> Iterator[None]:
    """Around reading a store: an OSError, which means that its storage did not answer, or refused, becomes an
    UnreadableError: nothing is known about its data."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or store.path} cannot be read: {error.strerror or error}"
        remedy = "mend the permissions, or renew the credentials, and verify again once the storage answers"
        raise UnreadableError(what, remedy=remedy) from error


def _check_data(store: Store, shard: int) -> list[str]:
    """What is wrong with a finished shard."""
    path = storage.join(store.path, commit_path(shard))
    try:
        commit = store.commit(shard)
        if commit is None:
            return []
        problems = [] if is_normal(path) else [f"{path} is damaged"]
        if commit.plan != store.schema.digests.get(rows_path(shard)):
            problems.append("it was written from another plan")
        return [*problems, *_check_arrays(store, commit), *_check_pixels(store, commit)]
    except (OSError, StoreError, SchemaError) as error:
        return [_describe_damage(store, error)]


def _check_arrays(store: Store, commit: Commit) -> Iterator[str]:
    """The arrays of a shard: checksums, the commit's digest, status against counts, and norms."""
    arrays = store.shard_arrays(commit.shard)
    status_N = arrays[STATUS]
    if digest_arrays(*arrays.values()) != commit.digest:
        yield "its arrays are not those that were committed"
    codes, counts = np.unique(status_N, return_counts=True)
    names = {code.value: code.name for code in Status}
    found = {names.get(int(code), str(code)): int(n) for code, n in zip(codes, counts, strict=True)}
    if found != commit.counts:
        yield f"its rows are {_show_counts(found)}, and its commit says {_show_counts(commit.counts)}"
    failed = (np.flatnonzero(status_N != Status.OK) + commit.start).tolist()
    if [failure.row for failure in store.failures(commit)] != failed:
        yield "the rows that failed are not those that its commit gives reasons for"
    norm_NV, good_N = _norms(arrays[EMBEDDING]), status_N == Status.OK
    odd = int((~(np.abs(norm_NV[good_N] - 1) < _NORM_OFF)).any(axis=1).sum())
    if odd:
        yield f"embeddings that are NaN or not of norm 1: {odd:,}"
    if norm_NV[~good_N].any():
        yield "there are embeddings in rows that failed"


def _norms(embedding: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The norms of embeddings (N, D) or, of V views, (N, V, D): float32 (N, V), with one view where there are none."""
    views, dim = embedding.shape[1:-1] or (1,), embedding.shape[-1]
    square_NV = np.empty((len(embedding), *views), np.float32)
    for at in range(0, len(embedding), _BLOCK):
        block_NVD = embedding[at : at + _BLOCK].astype(np.float32).reshape(-1, *views, dim)
        np.einsum("nvd,nvd->nv", block_NVD, block_NVD, out=square_NV[at : at + _BLOCK])
    return np.sqrt(square_NV)


def _show_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _check_pixels(store: Store, commit: Commit) -> Iterator[str]:
    path = storage.join(store.path, pixels_path(commit.shard))
    if store.schema.pixels and storage.digest_file(path) != commit.pixels:
        yield f"{path} is damaged: it is not the tar of JPEGs that was committed"


def is_normal(path: str) -> bool:
    """Whether a JSON file is byte for byte as we would write its content: other digits can parse to the same number."""
    data = storage.read_bytes(path)
    return storage.json_bytes(json.loads(data)) == data


def _describe_damage(store: Store, error: Exception) -> str:
    """The message of an error about a file. Raises the error again where it only means that the storage did not answer,
    or refused: the file itself may be fine. A sector that a local disk cannot read back is lost."""
    if isinstance(error, OSError) and not isinstance(error, storage.GONE):
        lost = error.errno in (None, errno.EIO)  # Arrow and codecs give no number to what they cannot decode
        if storage.is_url(store.path) or not lost:
            raise error
    return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """An error's message in one line, without its remedy; `Verification` has its own."""
    if isinstance(error, SchemaError):
        return f"{error.where}: {'; '.join(map(str, error.problems))}"
    if isinstance(error, DimefmError):
        return error.what
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} is missing"
    return str(error)
