"""Planning: fix which sample is row r before any work, or find that an earlier run of the same command did."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cache_schemas import IMAGE_PLAN, TEXT_PLAN, EmbeddingStore, SourceSummary, TeacherIdentity
from cache_schemas.embedding_store import ATTRIBUTES_KEY, COMMITS, EMBEDDING, ROWS, STATUS
from dimefm import storage
from dimefm.errors import MismatchError, OutputExistsError, SourceError
from dimefm.sources import open_image_source, open_text_source
from dimefm.store import Store, write_plan

_LEAST_SHARD, _MOST_SHARD, _CHUNK = 512, 65536, 1024
_BYTES_PER_ROW = {"image": 16_000, "text": 40}  # a guess that only sets the order of magnitude of a shard


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan: the arguments that name the source, and how the store is to be cut."""

    kind: Literal["image", "text"]
    arguments: tuple[str, ...]
    shard_rows: int | None = None
    batch_size: int = 64


@dataclass
class _Tally:
    """What planning finds out beside the rows."""

    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("Q"))

    def repeated_keys(self) -> int:
        return len(self.keys) - int(_first_of_each(self.keys).sum())


@dataclass(frozen=True)
class Forecast:
    """What a plan would hold, without writing it."""

    rows: int
    shards: int
    source: SourceSummary
    bytes_out: int


def open_or_plan(request: PlanRequest, out: str, teacher: TeacherIdentity) -> Store:
    """The store at `out`: opened if the same command made it, planned if there is none.

    Raises SourceError for an empty source, OutputExistsError where something else is at `out`, MismatchError where a
    store is there that another source, teacher or setting made.
    """
    out = storage.absolute(out)
    source = _open(request)
    files = source.files()
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind)
    if _is_planned(out):
        store = Store(out)
        _require_same(store, request, _digest(files), shard_rows, teacher)
        return store
    storage.remove_folder(storage.join(out, ROWS))  # of a run that was stopped while it planned
    tally = _Tally()
    rows = 0
    for shard, batch in enumerate(_batches(_samples(request, source, tally), shard_rows)):
        write_plan(out, shard, _table(request.kind, batch, shard * shard_rows))
        rows += len(batch)
    schema = EmbeddingStore(
        kind=request.kind,
        rows=_require_rows(rows, request),
        dim=teacher.embed_dim,
        chunk_rows=min(_CHUNK, shard_rows),
        shard_rows=shard_rows,
        batch_size=request.batch_size,
        teacher=teacher,
        source=_summary(request, files, tally),
    )
    return Store.create(out, schema)


def forecast(request: PlanRequest, embed_dim: int) -> Forecast:
    """Go through the source as planning would, and write nothing."""
    source = _open(request)
    files = source.files()
    tally = _Tally()
    rows = _require_rows(sum(1 for _ in _samples(request, source, tally)), request)
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind)
    return Forecast(rows, -(-rows // shard_rows), _summary(request, files, tally), rows * (2 * embed_dim + 1))


def choose_shard_rows(source_bytes: int, kind: str) -> int:
    """Rows of a shard, a power of two from 512 to 65,536, for about 64 shards or more; by the source's bytes alone."""
    estimate = source_bytes // _BYTES_PER_ROW[kind] // 64
    return min(_MOST_SHARD, max(_LEAST_SHARD, 1 << max(0, estimate - 1).bit_length()))


def _open(request: PlanRequest) -> Any:
    if request.shard_rows and request.shard_rows > _CHUNK and request.shard_rows % _CHUNK:
        what = f"shards of {request.shard_rows:,} rows are not whole chunks"
        raise SourceError(what, remedy=f"give --shard-rows a multiple of {_CHUNK:,}, or less than that")
    opener = open_image_source if request.kind == "image" else open_text_source
    return opener(list(request.arguments))


def _samples(request: PlanRequest, source: Any, tally: _Tally) -> Iterator[Any]:
    if request.kind == "image":
        for sample in source.samples(tally.problems.append):
            tally.keys.append(_hash(sample.key))
            tally.bytes += sample.size
            yield sample
        return
    # Two passes over the sentences: 8 bytes a sentence are kept to know the repeats, not the sentences themselves.
    hashes = array("Q", (_hash(sample.text) for sample in source.samples(lambda problem: None)))
    keep = _first_of_each(hashes)
    tally.dropped["repeated"] = len(keep) - int(keep.sum())
    for sample, first in zip(source.samples(tally.problems.append), keep, strict=True):
        if first:
            tally.bytes += len(sample.text.encode())
            yield sample


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _first_of_each(hashes: array[int]) -> np.ndarray[Any, Any]:
    """True where a value occurs for the first time."""
    values = np.frombuffer(hashes, np.uint64) if len(hashes) else np.empty(0, np.uint64)
    order = np.argsort(values, kind="stable")
    first = np.ones(len(values), bool)
    first[order[1:]] = values[order[1:]] != values[order[:-1]]
    return first


def _batches(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def _table(kind: str, batch: list[Any], start: int) -> pa.Table:
    schema = IMAGE_PLAN if kind == "image" else TEXT_PLAN
    columns = {name: [getattr(sample, name) for sample in batch] for name in schema.names if name != "row"}
    return pa.table({"row": list(range(start, start + len(batch))), **columns}, schema=schema)


def _require_rows(rows: int, request: PlanRequest) -> int:
    if rows == 0:
        what = f"no {request.kind} in {', '.join(request.arguments)}"
        raise SourceError(what, remedy="check that the files hold what you mean to cache")
    return rows


def _digest(files: list[Any]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\n".encode())
    return digest.hexdigest()


def _summary(request: PlanRequest, files: list[Any], tally: _Tally) -> SourceSummary:
    return SourceSummary(
        arguments=request.arguments,
        files=len(files),
        bytes=tally.bytes,
        digest=_digest(files),
        repeated_keys=tally.repeated_keys(),
        dropped=tally.dropped,
        problems=tuple(tally.problems),
    )


def _is_planned(out: str) -> bool:
    names = set(storage.listing(out))
    if not names:
        if not storage.is_url(out) and Path(out).is_file():
            raise OutputExistsError(f"{out} exists and is a file", remedy="give another --out")
        return False
    strangers = names - {"zarr.json", EMBEDDING, STATUS, ROWS, COMMITS}
    if strangers:
        what = f"{out} exists and is not an embedding store (it holds {min(strangers)!r})"
        raise OutputExistsError(what, remedy="give another --out")
    if "zarr.json" not in names:
        return False
    planned = ATTRIBUTES_KEY in storage.read_json(storage.join(out, "zarr.json")).get("attributes", {})
    if not planned and storage.listing(storage.join(out, COMMITS)):
        raise OutputExistsError(f"{out} has finished shards but no attributes", remedy="it is damaged: delete it")
    return planned


def _require_same(store: Store, request: PlanRequest, digest: str, shard_rows: int, teacher: TeacherIdentity) -> None:
    schema = store.schema
    differences = [
        f"{name}: {mine} != {theirs}"
        for name, mine, theirs in (
            ("kind", schema.kind, request.kind),
            ("source", schema.source.digest, digest),
            ("shard_rows", schema.shard_rows, shard_rows),
            ("batch_size", schema.batch_size, request.batch_size),
        )
        if mine != theirs
    ]
    differences += [f"teacher.{d}" for d in schema.teacher.differences(teacher)]
    if differences:
        lines = "".join(f"\n  - {d}" for d in differences)
        what = f"{store.path} was made by another command (its own != this one's):{lines}"
        raise MismatchError(what, remedy="give another --out, or repeat the command that made it")
