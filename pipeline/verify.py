"""`dimefm verify`: every byte of a store against its checksums, its plan against its commits, its rows against what an
embedding must be; and, where asked, rows encoded again by the live teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache_schemas import FILES, Commit, SchemaError, Status, parse_plan
from cache_schemas.embedding_store import EMBEDDING, STATUS, commit_path, pixels_path, rows_path
from cache_schemas.plan import FILES_TABLE, PLANS
from dimefm import storage
from dimefm.clip import load_clip
from dimefm.errors import StoreError
from dimefm.lock import writing
from dimefm.store import Store, digest_arrays, plan_digest, read_table, sha256
from pipeline.shard import compare_again

_NORM_OFF = 2e-3  # float16 of a unit vector
_SAME = 0.999
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """`sample` rows are encoded again by the teacher, from `teacher` where it is elsewhere now; `repair` removes the
    commits of bad shards."""

    store: str
    sample: int | None = None
    teacher: str | None = None
    pretrained: str | None = None
    repair: bool = False


@dataclass
class Report:
    """What was found. `bad` are the shards that must be written again; `faults` are those of the store as a whole,
    which cannot be mended that way."""

    store: str
    rows: int
    done: int
    shards: int
    bad: dict[int, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def trusted(self) -> bool:
        """Whether everything that is there is as it was written, and everything is there."""
        return not self.bad and not self.faults and self.done == self.shards

    def show(self) -> str:
        """The report in lines."""
        lines = [f"{self.store}: {self.rows:,} rows, {self.done:,} of {self.shards:,} shards done"]
        found = [f"shard {shard}: {what}" for shard, problems in sorted(self.bad.items()) for what in problems]
        found += self.faults
        lines += [f"  bad   {line}" for line in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  bad   and {len(found) - _SHOWN:,} more")
        lines += [f"  note  {note}" for note in self.notes]
        if self.repaired:
            lines.append(
                f"  marked {len(self.bad)} shards: run the command that wrote the store again, and verify again"
            )
        verdict = "can be trusted" if self.trusted else "must not be trusted"
        if not self.bad and not self.faults and not self.trusted:
            verdict = "is unfinished; what is there can be trusted"
        return "\n".join([*lines, f"  the store {verdict}"])


def verify(config: VerifyConfig) -> Report:
    """Read a whole store. Raises StoreError, SchemaError where it cannot even be opened."""
    store = Store(config.store)
    schema = store.schema
    report = Report(store.path, schema.rows, len(store.committed()), schema.shards)
    digests: list[str] = []
    keys = _Keys()
    for shard in range(schema.shards):
        problems, digest = _check_shard(store, shard, keys)
        digests.append(digest)
        if problems:
            report.bad[shard] = problems
    _check_whole(store, digests, report)
    if keys.repeated() != schema.source.repeated_keys and schema.kind == "image":
        report.faults.append(f"{keys.repeated():,} keys are repeated; the plan had {schema.source.repeated_keys:,}")
    elif keys.repeated():
        report.notes.append(f"{keys.repeated():,} keys are repeated, as they were in the source; each has its own row")
    if config.sample:
        _check_teacher(store, config, report)
    if config.repair and report.bad:
        with writing(store.path):
            for shard in report.bad:
                storage.remove_file(storage.join(store.path, commit_path(shard)))
        report.repaired = True
    return report


class _Keys:
    """Counts keys that come twice, by 64-bit hashes."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray[Any, Any]] = []

    def add(self, keys: list[str]) -> None:
        self._hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))

    def repeated(self) -> int:
        hashes = np.sort(np.concatenate(self._hashes)) if self._hashes else np.empty(0, np.int64)
        return int((hashes[1:] == hashes[:-1]).sum())


def _check_shard(store: Store, shard: int, keys: _Keys) -> tuple[list[str], str]:
    """What is wrong with a shard, and the digest of its plan."""
    problems: list[str] = []
    start, stop = store.schema.shard_range(shard)
    path, digest = storage.join(store.path, rows_path(shard)), "00" * 32
    try:
        digest = sha256(storage.read_bytes(path))
        table = parse_plan(read_table(path, PLANS[store.schema.kind]), store.schema.kind, start, stop, path)
        keys.add(table["key"].to_pylist())
    except (OSError, StoreError, SchemaError) as error:
        problems.append(f"its plan: {error}")
    try:
        commit = store.commit(shard)
    except (StoreError, SchemaError) as error:
        return [*problems, f"its commit: {error}"], digest
    if commit is None:
        return problems, digest
    if commit.plan != digest:
        problems.append("its plan is not the one that it was written from")
    if (commit.shard, commit.start, commit.stop) != (shard, start, stop):
        problems.append(f"its commit is of shard {commit.shard}, rows {commit.start} to {commit.stop - 1}")
    try:
        problems += _check_data(store, commit)
        problems += _check_pixels(store, commit)
    except (OSError, StoreError) as error:
        problems.append(str(error))
    return problems, digest


def _check_data(store: Store, commit: Commit) -> Iterator[str]:
    """The arrays of a shard: checksums, the commit's digest, status against counts, and norms."""
    arrays = store.shard_arrays(commit.shard)
    status_N = arrays[STATUS]
    if digest_arrays(*arrays.values()) != commit.digest:
        yield "its arrays are not those that were committed"
    codes, counts = np.unique(status_N, return_counts=True)
    names = {code.value: code.name for code in Status}
    found = {names.get(int(code), str(code)): int(n) for code, n in zip(codes, counts, strict=True)}
    if found != commit.counts:
        yield f"status says {found}, its commit {commit.counts}"
    norm = np.linalg.norm(arrays[EMBEDDING].astype(np.float32), axis=-1).reshape(len(status_N), -1)
    good = status_N == Status.OK
    odd = int((~(np.abs(norm[good] - 1) < _NORM_OFF)).any(axis=1).sum())
    if odd:
        yield f"{odd:,} embeddings are NaN or not of norm 1"
    if norm[~good].any():
        yield "there are embeddings in rows that failed"


def _check_pixels(store: Store, commit: Commit) -> Iterator[str]:
    if (
        store.schema.pixels
        and storage.digest_file(storage.join(store.path, pixels_path(commit.shard))) != commit.pixels
    ):
        yield "its tar of JPEGs is not the one that was committed"


def _check_whole(store: Store, digests: list[str], report: Report) -> None:
    """What no single shard can answer for: the plan as a whole, and files that do not belong."""
    schema = store.schema
    if plan_digest(digests) != schema.plan:
        report.faults.append("rows/: the plan is not the one that the store was made with; cache again")
    try:
        read_table(storage.join(store.path, FILES_TABLE), FILES)
    except StoreError as error:
        report.faults.append(str(error))
    expected = {rows_path(shard) for shard in range(schema.shards)} | {FILES_TABLE}
    expected |= {commit_path(shard) for shard in range(schema.shards)} | {"zarr.json"}
    expected |= {pixels_path(shard) for shard in range(schema.shards)} if schema.pixels else set()
    for name in schema.arrays():
        expected |= {store.shard_file(name, shard) for shard in range(schema.shards)} | {f"{name}/zarr.json"}
    foreign = sorted(storage.tree(store.path) - expected)
    report.faults += [f"{name} does not belong to the store; move it away" for name in foreign]


def _check_teacher(store: Store, config: VerifyConfig, report: Report) -> None:
    """Rows spread over the good shards, encoded again by the teacher: the least cosine must be near 1."""
    assert config.sample is not None
    shards = [shard for shard in sorted(store.committed()) if shard not in report.bad]
    ranges = [np.arange(*store.schema.shard_range(shard)) for shard in shards]
    rows = np.concatenate([r[store.status(r[0], r[-1] + 1) == Status.OK] for r in ranges] or [np.empty(0, np.int64)])
    if not len(rows):
        return
    chosen = np.unique(rows[np.linspace(0, len(rows) - 1, min(config.sample, len(rows))).astype(np.int64)])
    known = store.schema.teacher
    name, tag = config.teacher or known.name, config.pretrained if config.teacher else known.pretrained
    clip = load_clip(name, tag, precision=known.precision)
    differences = known.differences(clip.identity)
    if differences:
        report.faults.append(f"{name} is not the teacher of the store: {'; '.join(differences)}")
        return
    found = compare_again(store, clip, chosen)
    worst = min(found, key=lambda one: one[2])
    report.notes.append(f"{len(found):,} rows encoded again: least cosine {worst[2]:.6f} (row {worst[0]}, {worst[1]})")
    for row, key, cosine in found:
        if cosine < _SAME:
            problem = f"row {row} ({key}) encoded again has cosine {cosine:.4f} to what is stored"
            report.bad.setdefault(row // store.schema.shard_rows, []).append(problem)
