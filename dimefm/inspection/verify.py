"""`dimefm verify`: check every byte of a store against its checksums, its plan against its commits, and its embeddings
for their norm; and, if asked, encode rows again with the teacher.

Shapes: N rows of a shard.
"""

from __future__ import annotations

import errno
import json
import math
from array import array
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache_schemas import Commit, SchemaError, Status
from cache_schemas.embedding_store import (
    ATTRIBUTES_KEY,
    EMBEDDING,
    STATUS,
    commit_path,
    failures_path,
    pixels_path,
    rows_path,
)
from cache_schemas.plan import FILES_TABLE
from dimefm.caching.repeats import as_array, repeats
from dimefm.errors import DimefmError, MismatchError, StoreError, UnreadableError
from dimefm.inspection.info import examine
from dimefm.store.commit import remove_commit
from dimefm.store.embedding_store import Store
from dimefm.store.failures import failures_by_status
from dimefm.store.zarr_arrays import digest_arrays
from dimefm.system import inert_text, storage
from dimefm.system.lock import writing
from dimefm.system.progress import Progress
from dimefm.system.wording import counted, hanging

_NORM_OFF = 2e-3  # how far rounding to float16 may move the norm of a unit vector
_SAME = 0.999  # the least cosine of a row that is encoded again
_SHOWN = 20  # faults that are listed


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to verify, and whether to mark what is bad."""

    store: str
    """Store to verify."""
    sample: int | None = None
    """Number of rows to encode again with the teacher and compare. Default: none."""
    teacher: str | None = None
    """Where the teacher is now, for `sample`. Default: where it was."""
    pretrained: str | None = None
    """Weights of a plain NAME given as `teacher`: an open_clip tag or a file."""
    repair: bool = False
    """Mark bad shards as not done, so that the command that wrote them does them again."""


@dataclass
class Verification:
    """What was found. `bad`: what is wrong with each shard that must be written again. `faults`: what is wrong with the
    store as a whole, which writing shards again does not mend. `empty`: why no row has an embedding, if none has."""

    store: str
    rows: int
    done: int
    shards: int
    bad: dict[int, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def trusted(self) -> bool:
        """Whether the store is complete, exactly as it was written, and has at least one embedding."""
        return not self.bad and not self.faults and self.done == self.shards and not self.empty

    def facts(self) -> dict[str, Any]:
        """The report for a program."""
        return {
            "store": self.store,
            "trusted": self.trusted,
            "rows": self.rows,
            "shards": self.shards,
            "shards_done": self.done,
            "bad_shards": [{"shard": shard, "problems": what} for shard, what in sorted(self.bad.items())],
            "faults": self.faults,
            "notes": self.notes,
            "no_embedding": self.empty,
            "repaired": self.repaired,
            "verdict": self._verdict(),
        }

    def show(self) -> str:
        """The report in lines."""
        lines = [f"{self.store}: {counted(self.rows, 'row')}, {self.done:,} of {self.shards:,} shards done"]
        found = [f"shard {shard}: {what}" for shard, problems in sorted(self.bad.items()) for what in problems]
        found += self.faults
        lines += [f"  bad   {inert_text.line(one)}" for one in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  bad   and {len(found) - _SHOWN:,} more")
        lines += [f"  note  {inert_text.line(note)}" for note in self.notes]
        lines += [f"  failed  {inert_text.line(one)}" for one in self.empty]
        return "\n".join([*lines, hanging("  ", self._verdict())])

    def _verdict(self) -> str:
        shards = counted(len(self.bad), "bad shard")
        if self.repaired:
            return f"{shards} marked: run the command that wrote the store again, then verify again"
        if self.bad:
            again = f"to mend the {shards}, give --repair, then run the command that wrote the store again"
            return f"the store must not be trusted; {again}"
        if self.faults:
            return "the store must not be trusted"
        if self.done < self.shards:
            return "the store is unfinished: run the command that writes it again; the finished part can be trusted"
        if self.empty:
            return "the store is as it was written, but no row has an embedding: mend the source, and write it again"
        return "the store can be trusted"


def verify(config: VerifyConfig) -> Verification:
    """Read and check a whole store. Raises StoreError or SchemaError where it cannot even be opened; UnreadableError
    where its storage does not answer: then nothing is known about its data, and no shard is marked."""
    store = _open(config.store)
    with writing(store.path) if config.repair else nullcontext():
        try:
            report = _check(store)
        except OSError as error:
            what = f"{error.filename or store.path} cannot be read: {error.strerror or error}"
            remedy = "mend the permissions, or renew the credentials, and verify again once the storage answers"
            raise UnreadableError(what, remedy=remedy) from error
        if config.sample:
            _check_teacher(store, config, report)
        if config.repair and report.bad:
            for shard in report.bad:
                remove_commit(store.path, shard)
            report.repaired = True
    return report


def _open(path: str) -> Store:
    """Open the store. Raises StoreError where something else lies there, and says what."""
    try:
        return Store(path)
    except (SchemaError, StoreError):
        found = None
        with suppress(DimefmError, OSError, SchemaError):
            found = examine(path)
        if found is None or found.facts["artefact"] == "store":
            raise
        what = f"{found.title}; verify checks stores of embeddings alone"
        raise StoreError(what, remedy=f"dimefm info {path} describes it") from None


def _check(store: Store) -> Verification:
    schema = store.schema
    report = Verification(store.path, schema.rows, len(store.committed()), schema.shards)
    keys = _Keys()
    with Progress("checking", schema.shards, "shard") as progress:
        for shard in range(schema.shards):
            _check_plan(store, shard, keys, report)
            problems = _check_shard(store, shard)
            if problems:
                report.bad[shard] = problems
            progress.at(shard + 1)
    _check_documents(store, report)
    _check_foreign(store, report)
    if not report.bad and store.contents.shards and not store.contents.good:
        report.empty = failures_by_status(store)
    repeated = keys.repeated()
    if schema.kind == "image" and repeated != schema.source.repeated_keys:
        report.faults.append(f"repeated keys: {repeated:,}, where the source had {schema.source.repeated_keys:,}")
    elif schema.kind == "image" and repeated:
        report.notes.append(f"repeated keys: {repeated:,}, as in the source; each has its own row")
    return report


class _Keys:
    """Counts repeated keys, by 64-bit hashes."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, keys: list[str]) -> None:
        self._hashes.extend(map(hash, keys))

    def repeated(self) -> int:
        return sum(len(places) for places in repeats(as_array(self._hashes)))


def _check_plan(store: Store, shard: int, keys: _Keys, report: Verification) -> None:
    """A damaged plan is a fault of the store, and not of the shard: writing the shard again would not mend it."""
    try:
        keys.add(store.plan(shard)["key"].to_pylist())
    except (OSError, StoreError, SchemaError) as error:
        report.faults.append(_describe_damage(store, error))


def _check_shard(store: Store, shard: int) -> list[str]:
    """What is wrong with a finished shard."""
    path = storage.join(store.path, commit_path(shard))
    try:
        commit = store.commit(shard)
        if commit is None:
            return []
        problems = [] if _is_normal(path) else [f"{path} is damaged"]
        if commit.plan != store.schema.digests.get(rows_path(shard)):
            problems.append("it was written from another plan")
        return [*problems, *_check_data(store, commit), *_check_pixels(store, commit)]
    except (OSError, StoreError, SchemaError) as error:
        return [_describe_damage(store, error)]


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
        yield f"its rows are {_show_counts(found)}, and its commit says {_show_counts(commit.counts)}"
    failed = (np.flatnonzero(status_N != Status.OK) + commit.start).tolist()
    if [failure.row for failure in store.failures(commit)] != failed:
        yield "the rows that failed are not those that its commit gives reasons for"
    norm = np.linalg.norm(arrays[EMBEDDING].astype(np.float32), axis=-1).reshape(len(status_N), -1)
    good = status_N == Status.OK
    odd = int((~(np.abs(norm[good] - 1) < _NORM_OFF)).any(axis=1).sum())
    if odd:
        yield f"embeddings that are NaN or not of norm 1: {odd:,}"
    if norm[~good].any():
        yield "there are embeddings in rows that failed"


def _show_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _check_pixels(store: Store, commit: Commit) -> Iterator[str]:
    path = storage.join(store.path, pixels_path(commit.shard))
    if store.schema.pixels and storage.digest_file(path) != commit.pixels:
        yield f"{path} is damaged: it is not the tar of JPEGs that was committed"


def _check_documents(store: Store, report: Verification) -> None:
    """Check every byte of the attributes, and the table of files. The zarr.json of the arrays were compared when the
    store was opened."""
    path = storage.join(store.path, "zarr.json")
    attributes = store.group.attrs.asdict()
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    if attributes.keys() != {ATTRIBUTES_KEY} or not _is_normal(path) or storage.read_json(path) != document:
        report.faults.append(f"{path} is damaged")
    try:
        store.source_files()
    except StoreError as error:
        report.faults.append(_in_one_line(error))


def _is_normal(path: str) -> bool:
    """Whether a JSON file is byte for byte as we would write its content: other digits can parse to the same number."""
    data = storage.read_bytes(path)
    return storage.json_bytes(json.loads(data)) == data


def _check_foreign(store: Store, report: Verification) -> None:
    schema, shards = store.schema, range(store.schema.shards)
    expected = {"zarr.json", FILES_TABLE}
    expected |= {path(shard) for shard in shards for path in (rows_path, commit_path, failures_path)}
    expected |= {pixels_path(shard) for shard in shards} if schema.pixels else set()
    for name in schema.arrays():
        expected |= {store.shard_file(name, shard) for shard in shards} | {f"{name}/zarr.json"}
    foreign = sorted(storage.tree(store.path) - expected)
    report.faults += [
        f"{storage.join(store.path, name)} does not belong to the store: move it away" for name in foreign
    ]


def _describe_damage(store: Store, error: Exception) -> str:
    """The message of an error about a file. Raises the error again where it only means that the storage did not answer,
    or refused: the file itself may be fine. A sector that a local disk cannot read back is lost."""
    if isinstance(error, OSError) and not isinstance(error, storage.GONE):
        lost = error.errno in (None, errno.EIO)  # Arrow and codecs give no number to what they cannot decode
        if storage.is_url(store.path) or not lost:
            raise error
    return _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    """An error's message in one line, without its remedy; `Verification` has its own."""
    if isinstance(error, SchemaError):
        return f"{error.where}: {'; '.join(map(str, error.problems))}"
    if isinstance(error, DimefmError):
        return error.what
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} is missing"
    return str(error)


def _check_teacher(store: Store, config: VerifyConfig, report: Verification) -> None:
    """Encode rows again, spread over the good shards: the cosine of each to what is stored must be near 1."""
    from dimefm.caching.canary import compare_again  # these import torch
    from dimefm.models.clip import load_clip, require_teacher
    from dimefm.models.hub import require_cached

    assert config.sample is not None
    shards = [shard for shard in sorted(store.committed()) if shard not in report.bad]
    ranges = [np.arange(*store.schema.shard_range(shard)) for shard in shards]
    rows = np.concatenate([r[store.status(r[0], r[-1] + 1) == Status.OK] for r in ranges] or [np.empty(0, np.int64)])
    if not len(rows):
        return
    chosen = np.unique(rows[np.linspace(0, len(rows) - 1, min(config.sample, len(rows))).astype(np.int64)])
    known = store.schema.teacher
    name, tag = config.teacher or known.name, config.pretrained if config.teacher else known.pretrained
    if not config.teacher:
        require_cached(name, store.path)
    clip = load_clip(name, tag, known=known, precision=known.precision)
    try:
        require_teacher(clip, known, "the store", remedy="name it with --teacher and --pretrained")
    except MismatchError as error:
        report.faults.append(error.what)
        return
    found = compare_again(store, clip, chosen)
    gone = [one for one in found if math.isnan(one[2])]
    read = [one for one in found if not math.isnan(one[2])]
    if gone:
        row, key, _ = gone[0]
        report.notes.append(
            f"{len(gone):,} of {counted(len(found), 'row')} can no longer be read, such as row {row} ({key})"
        )
    if read:
        row, key, cosine = min(read, key=lambda one: one[2])
        least = f"least cosine to what is stored {cosine:.6f}, row {row} ({key})"
        report.notes.append(f"{counted(len(read), 'row')} encoded again: {least}")
    for row, key, cosine in found:
        if cosine < _SAME:
            problem = f"row {row} ({key}) encoded again has cosine {cosine:.4f} to what is stored"
            report.bad.setdefault(row // store.schema.shard_rows, []).append(problem)
