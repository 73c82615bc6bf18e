"""Planning: fix which sample is row r before any work, or find that an earlier run of the same command did."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cache_schemas import FILES, EmbeddingStore, SourceSummary, TeacherIdentity, ViewPlan, to_plain
from cache_schemas.embedding_store import (
    ATTRIBUTES_KEY,
    COMMITS,
    EMBEDDING,
    PIXEL_RANGE,
    PIXELS,
    ROWS,
    STATUS,
    VIEW,
    rows_path,
)
from cache_schemas.plan import FILES_TABLE, PLANS
from dimefm import storage
from dimefm.errors import MismatchError, OutputExistsError, SourceError
from dimefm.sources import open_image_source, open_text_source
from dimefm.store import Store, plan_digest, write_plan, write_table
from pipeline.sentences import SentenceRules, tidy

_LEAST_SHARD, _MOST_SHARD, _CHUNK = 512, 65536, 1024
_BYTES_PER_ROW = {"image": 16_000, "text": 40}  # a guess that only sets the order of magnitude of a shard
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan: the arguments that name the source, what to take of it, and how the store is to be cut."""

    kind: Literal["image", "text"]
    arguments: tuple[str, ...]
    column: str | None = None
    sentences: SentenceRules = field(default_factory=SentenceRules)
    views: ViewPlan | None = None
    pixels: int | None = None
    shard_rows: int | None = None
    batch_size: int = 64

    def settings(self) -> dict[str, object]:
        """What decides the rows beside the files."""
        column: dict[str, object] = {"column": self.column} if self.column else {}
        return {**column, **self.sentences.settings()} if self.kind == "text" else column


@dataclass
class _Tally:
    """What planning finds out beside the rows."""

    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("q"))

    def repeated_keys(self) -> int:
        values = np.frombuffer(self.keys, np.int64) if len(self.keys) else np.empty(0, np.int64)
        values = np.sort(values)
        return int((values[1:] == values[:-1]).sum())


@dataclass(frozen=True)
class Forecast:
    """What a plan would hold, without writing it: the store's attributes, its arrays' bytes, a few entries."""

    schema: EmbeddingStore
    bytes_out: int
    first: list[dict[str, Any]]


def open_or_plan(request: PlanRequest, out: str, teacher: TeacherIdentity) -> Store:
    """The store at `out`: opened if the same command made it, planned if there is none.

    Raises SourceError for an empty source, OutputExistsError where something else is at `out`, MismatchError where a
    store is there that another source, teacher or setting made, or whose source has changed since.
    """
    out = storage.absolute(out)
    source = _open(request)
    files = source.files()
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind)
    require_no_stranger(out)
    if _is_planned(out):
        store = Store(out)
        _require_same(store, request, files, shard_rows, teacher)
        return store
    storage.remove_folder(storage.join(out, ROWS))  # of a run that was stopped while it planned
    tally = _Tally()
    rows, digests = 0, []
    for shard, table in enumerate(_tables(request, source, shard_rows, tally)):
        digests.append(write_plan(out, shard, table))
        rows += table.num_rows
    schema = _schema(request, files, tally, rows, shard_rows, teacher, plan_digest(digests))
    write_table(storage.join(out, FILES_TABLE), _file_table(files))
    return Store.create(out, replace(schema, digests={rows_path(i): digest for i, digest in enumerate(digests)}))


def forecast(request: PlanRequest, teacher: TeacherIdentity, keep: int = 0) -> Forecast:
    """Go through the source as planning would, and write nothing. Keeps the first `keep` entries."""
    source = _open(request)
    files = source.files()
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind)
    tally = _Tally()
    rows, first = 0, list[dict[str, Any]]()
    for table in _tables(request, source, _MOST_SHARD, tally):
        first += table.slice(0, keep - len(first)).to_pylist()
        rows += table.num_rows
    schema = _schema(request, files, tally, rows, shard_rows, teacher, plan="")
    specs = schema.arrays().values()
    return Forecast(schema, sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs), first)


def count_rows(request: PlanRequest) -> int:
    """The rows of a plan, without writing it."""
    return sum(table.num_rows for table in _tables(request, _open(request), _MOST_SHARD, _Tally()))


def _schema(
    request: PlanRequest,
    files: list[Any],
    tally: _Tally,
    rows: int,
    shard_rows: int,
    teacher: TeacherIdentity,
    plan: str,
) -> EmbeddingStore:
    if rows == 0:
        what = f"no {request.kind} in {', '.join(request.arguments)}"
        raise SourceError(what, remedy="check that the files hold what you mean to cache, and what is dropped")
    return EmbeddingStore(
        kind=request.kind,
        rows=rows,
        dim=teacher.embed_dim,
        chunk_rows=min(_CHUNK, shard_rows),
        shard_rows=shard_rows,
        batch_size=request.batch_size,
        teacher=teacher,
        source=SourceSummary(
            arguments=request.arguments,
            files=len(files),
            bytes=tally.bytes,
            digest=_digest(files, request.settings()),
            repeated_keys=tally.repeated_keys(),
            dropped=tally.dropped,
            problems=tuple(tally.problems),
            settings=request.settings(),
        ),
        plan=plan,
        views=request.views,
        pixels=request.pixels,
    )


def choose_shard_rows(source_bytes: int, kind: str) -> int:
    """Rows of a shard, a power of two from 512 to 65,536, for about 64 shards or more; by the source's bytes alone."""
    estimate = source_bytes // _BYTES_PER_ROW[kind] // 64
    return min(_MOST_SHARD, max(_LEAST_SHARD, 1 << max(0, estimate - 1).bit_length()))


def _open(request: PlanRequest) -> Any:
    if request.shard_rows and request.shard_rows > _CHUNK and request.shard_rows % _CHUNK:
        what = f"shards of {request.shard_rows:,} rows are not whole chunks"
        raise SourceError(what, remedy=f"give --shard-rows a multiple of {_CHUNK:,}, or less than that")
    opener = open_image_source if request.kind == "image" else open_text_source
    return opener(list(request.arguments), request.column)


def _samples(request: PlanRequest, source: Any, tally: _Tally) -> Iterator[Any]:
    if request.kind == "text":
        return tidy(source, request.sentences, tally.problems.append, tally.dropped)
    return iter(source.samples(tally.problems.append))


def _tables(request: PlanRequest, source: Any, size: int, tally: _Tally) -> Iterator[pa.Table]:
    """The plan in tables of `size` rows."""
    samples, schema, rows = _samples(request, source, tally), PLANS[request.kind], 0
    while batch := list(islice(samples, size)):
        columns = dict(zip(batch[0]._fields, zip(*batch, strict=True), strict=True))
        if request.kind == "image":
            tally.keys.extend(map(hash, columns["key"]))
        tally.bytes += sum(
            columns["size"] if request.kind == "image" else (len(text.encode()) for text in columns["text"])
        )
        yield pa.table({"row": np.arange(rows, rows + len(batch)), **columns}, schema=schema)
        rows += len(batch)


def _digest(files: list[Any], settings: dict[str, object]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\n".encode())
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _file_table(files: list[Any]) -> pa.Table:
    columns = {name: [getattr(file, name) for file in files] for name in FILES.names}
    return pa.table(columns, schema=FILES)


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(sep=" ", timespec="milliseconds")


def require_no_stranger(out: str) -> None:
    """Raises OutputExistsError where something is at `out` that is no embedding store, finished or not."""
    out = storage.absolute(out)
    names = set(storage.listing(out))
    if not names and not storage.is_url(out) and Path(out).is_file():
        raise OutputExistsError(f"{out} exists and is a file", remedy="give another --out")
    strangers = names - {"zarr.json", EMBEDDING, STATUS, VIEW, PIXEL_RANGE, ROWS, COMMITS, PIXELS}
    if strangers:
        what = f"{out} exists and is not an embedding store (it holds {min(strangers)!r})"
        raise OutputExistsError(what, remedy="give another --out")


def _is_planned(out: str) -> bool:
    if "zarr.json" not in storage.listing(out):
        return False
    planned = ATTRIBUTES_KEY in storage.read_json(storage.join(out, "zarr.json")).get("attributes", {})
    if not planned and storage.listing(storage.join(out, COMMITS)):
        raise OutputExistsError(f"{out} has finished shards but no attributes", remedy="it is damaged: delete it")
    return planned


def _require_same(
    store: Store, request: PlanRequest, files: list[Any], shard_rows: int, teacher: TeacherIdentity
) -> None:
    """Raises MismatchError naming every setting, and the files, that are not what the store was planned with."""
    schema = store.schema
    changes = _changes(store, files)
    own = {**_flat(schema.source.settings), **_flat({"views": schema.views}), "pixels": schema.pixels}
    asked = {**_flat(request.settings()), **_flat({"views": request.views}), "pixels": request.pixels}
    own |= {"kind": schema.kind, "batch_size": schema.batch_size}
    asked |= {"kind": request.kind, "batch_size": request.batch_size}
    if request.shard_rows or not changes:  # else it was chosen by files that are named below
        own["shard_rows"], asked["shard_rows"] = schema.shard_rows, shard_rows
    names = sorted(own.keys() | asked.keys())
    differences = [f"{n}: {own.get(n)} != {asked.get(n)}" for n in names if own.get(n) != asked.get(n)]
    differences += [f"teacher.{d}" for d in schema.teacher.differences(teacher)]
    if not differences and not changes:
        if schema.source.digest == _digest(files, request.settings()):
            return
        changes = ["the files are given in another order"]
    what = f"{store.path} was made by another command (its own != this one's):"
    remedy = "give another --out, or repeat the command that made it"
    if not differences:
        what = f"the source of {store.path} has changed since it was planned:"
        remedy = "put the files back as they were, their times too, or give another --out"
    shown = sorted(changes)[:_SHOWN]
    lines = differences + [f"source: {change}" for change in shown]
    if len(changes) > _SHOWN:
        lines.append(f"source: and {len(changes) - _SHOWN:,} more")
    raise MismatchError(what + "".join(f"\n  - {line}" for line in lines), remedy=remedy)


def _changes(store: Store, files: list[Any]) -> list[str]:
    """The files that are not what they were when the plan was made."""
    before = {file["path"]: file for file in store.source_files().to_pylist()}
    now = {file.path: file for file in files}
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is gone" for name in before if name not in now]
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old["size"] != new.size:
            changes.append(f"{name} has changed: {old['size']:,} bytes when it was planned, {new.size:,} now")
        elif old["modified"] and new.modified and old["modified"] != new.modified:
            times = f"{_time(old['modified'])} when it was planned, {_time(new.modified)} now"
            changes.append(f"{name} has changed: written {times}")
    return changes


def _flat(value: object, path: str = "") -> dict[str, object]:
    """`{"views": {"count": 3}}` as `{"views.count": 3}`."""
    plain = to_plain(value)
    if not isinstance(plain, dict):
        return {path: plain}
    parts = [_flat(inner, f"{path}.{name}" if path else name) for name, inner in plain.items()]
    return {name: inner for part in parts for name, inner in part.items()}
