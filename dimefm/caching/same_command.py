"""What is at the place of a store already: nothing, the store that the same command planned, or something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cache_schemas import TeacherIdentity, ViewPlan, to_plain
from cache_schemas.embedding_store import (
    ATTRIBUTES_KEY,
    COMMITS,
    EMBEDDING,
    PIXEL_INDEX,
    PIXELS,
    ROWS,
    STATUS,
    VIEW,
)
from cache_schemas.plan import SourceFile
from dimefm.errors import MismatchError, OutputExistsError
from dimefm.sources.base import Source, names_of, paths_of
from dimefm.sources.files import change, expand, those_there
from dimefm.store.embedding_store import Store
from dimefm.system import inert_text, storage

_SHOWN = 3


def require_no_stranger(out: str) -> None:
    """Raises OutputExistsError where something is at `out` that is no embedding store, finished or not."""
    out = storage.absolute(out)
    names = set(storage.listing(out))
    if not names and not storage.is_url(out) and Path(out).is_file():
        raise OutputExistsError(f"{out} exists and is a file", remedy="give another --out")
    strangers = names - {"zarr.json", EMBEDDING, STATUS, VIEW, PIXEL_INDEX, ROWS, COMMITS, PIXELS}
    if strangers:
        what = f"{out} exists and is not an embedding store (it holds {min(strangers)!r})"
        raise OutputExistsError(what, remedy="give another --out")


def is_planned(out: str) -> bool:
    """Whether a store was planned at `out`. Raises OutputExistsError where one is that has lost its attributes."""
    out = storage.absolute(out)
    names, path = storage.listing(out), storage.join(out, "zarr.json")
    planned = "zarr.json" in names and ATTRIBUTES_KEY in storage.read_json(path).get("attributes", {})
    if not planned and storage.listing(storage.join(out, COMMITS)):
        raise OutputExistsError(f"{out} has finished shards but no attributes", remedy="it is damaged: delete it")
    return planned


def require_same(
    store: Store,
    files: Sequence[SourceFile],
    teacher: TeacherIdentity,
    *,
    kind: str,
    batch_size: int,
    shard_rows: int,
    chosen: bool,
    settings: dict[str, object],
    views: ViewPlan | None = None,
    pixels: int | None = None,
    decoder: str = "fast",
) -> None:
    """Raises MismatchError naming every setting, and the files, that are not what the store was planned with.

    `settings` are those of its source; with `chosen`, `shard_rows` was not asked for but follows from the files.
    """
    schema = store.schema
    changes = _changes(store, files)
    own = {**_flat(schema.source.settings), **_flat({"views": schema.views}), "pixels": schema.pixels}
    asked = {**_flat(settings), **_flat({"views": views}), "pixels": pixels}
    own |= {"kind": schema.kind, "batch_size": schema.batch_size, "decoder": schema.decoder}
    asked |= {"kind": kind, "batch_size": batch_size, "decoder": decoder}
    if not (chosen and changes):  # else it differs because of the files that are named below
        own["shard_rows"], asked["shard_rows"] = schema.shard_rows, shard_rows
    names = sorted(own.keys() | asked.keys())
    differences = [f"{n}: {own.get(n)} != {asked.get(n)}" for n in names if own.get(n) != asked.get(n)]
    differences += [f"teacher.{d}" for d in schema.teacher.differences(teacher)]
    if not differences and not changes:
        if schema.source.digest == source_digest(files, settings):
            return
        changes = ["the files are given in another order"]
    what = f"{store.path} was made by another command (its own != this one's):"
    remedy = "give another --out, or repeat the command that made it"
    if not differences:
        what = f"the source of {store.path} has changed since it was planned:"
        remedy = "put the files back as they were, their times too, or give another --out"
        if all(change.endswith(" is gone") for change in changes):
            remedy = "put the files back, or leave their rows out by --accept-missing"
        elif all(change.endswith(" is new") for change in changes):
            remedy = (
                "name the files that it was planned from alone, as by FOLDER/**/*.jpg in place of FOLDER (which gives "
            )
            remedy += "more of what is in it than in older releases), or give another --out for all of them"
    shown = sorted(changes)[:_SHOWN]
    lines = differences + [f"source: {inert_text.line(change)}" for change in shown]
    if len(changes) > _SHOWN:
        lines.append(f"source: and {len(changes) - _SHOWN:,} more")
    raise MismatchError(what + "".join(f"\n  - {line}" for line in lines), remedy=remedy)


def source_digest(files: Sequence[SourceFile], settings: dict[str, object]) -> str:
    """sha256 of every file's path and size, in order, and of the settings of the source."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\n".encode())
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _changes(store: Store, files: Sequence[SourceFile]) -> list[str]:
    """The files that are not what they were when the plan was made."""
    before = {file["path"]: SourceFile(**file) for file in store.source_files().to_pylist()}
    now = {file.path: file for file in files}
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is gone" for name in before if name not in now]
    return changes + [found for name in before.keys() & now.keys() if (found := change(before[name], now[name]))]


def arguments_there(out: str, arguments: Sequence[str | Source[Any]]) -> tuple[str | Source[Any], ...]:
    """The arguments without those that name what is gone, where the store at `out` was planned from the same ones.
    Raises AbsentError where it was not: a path may be mistyped."""
    found = tuple(one for each in arguments for one in (those_there(each) if isinstance(each, str) else [each]))
    if found != tuple(arguments) and not (
        is_planned(out) and Store(out).schema.source.arguments == names_of(arguments)
    ):
        for argument in paths_of(arguments):
            expand(argument)
        return tuple(arguments)  # back since: a plan without it would be for good
    return found


def with_gone(store: Store, files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files, and those of the plan that are not among them as they were, in their old places."""
    names, rest = {file.path for file in files}, iter(files)
    found: list[SourceFile] = []
    for file in store.source_files().to_pylist():
        found += islice(rest, 1) if file["path"] in names else [SourceFile(**file)]
    return [*found, *rest]


def _flat(value: object, path: str = "") -> dict[str, object]:
    """`{"views": {"count": 3}}` as `{"views.count": 3}`."""
    plain = to_plain(value)
    if not isinstance(plain, dict):
        return {path: plain}
    parts = [_flat(inner, f"{path}.{name}" if path else name) for name, inner in plain.items()]
    return {name: inner for part in parts for name, inner in part.items()}
