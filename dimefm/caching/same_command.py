"""Whether the store at --out is the one that this command planned: the same files, teacher and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from cache_schemas import EmbeddingStore, TeacherIdentity, ViewPlan, to_plain
from cache_schemas.embedding_store import (
    COMMITS,
    EMBEDDING,
    PIXEL_INDEX,
    PIXELS,
    ROWS,
    STATUS,
    VIEW,
    VIEWS,
)
from cache_schemas.pairs import CAPTION_PAIRS
from cache_schemas.plan import SourceFile
from dimefm.errors import MismatchError
from dimefm.sources.base import Source, names_of, paths_of
from dimefm.sources.files import describe_change, existing_names, expand
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import ANOTHER_OUT, OWN_AND_NEW, differing, in_lines, is_planned, require_only
from dimefm.system import inert_text

_SHOWN = 3  # changed files
_PUT_BACK = f"put the files back as they were, with their times, or {ANOTHER_OUT}"


def require_no_stranger(out: str) -> None:
    """Raises OutputExistsError where something is at `out` that is not an embedding store, finished or not."""
    ours = {"zarr.json", EMBEDDING, STATUS, VIEW, PIXEL_INDEX, ROWS, COMMITS, PIXELS, VIEWS, CAPTION_PAIRS}
    require_only(out, "an embedding store", ours)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command asks of its store, beside the files and the teacher. `source_settings` are those that decide the
    rows, such as a column. `shard_rows_derived`: it follows from the files, and was not given by the user."""

    kind: str
    batch_size: int
    shard_rows: int
    shard_rows_derived: bool
    source_settings: dict[str, object]
    views: ViewPlan | None = None
    pixels: int | None = None
    decoder: str = "fast"


def require_same_command(store: Store, files: Sequence[SourceFile], teacher: TeacherIdentity, asked: Asked) -> None:
    """Raises MismatchError naming every setting, and the first files, that are not what the store was planned with.
    More views than it has are no difference: they can be added."""
    changes = _changes(store, files)
    if fewer := _fewer_views(store.schema.views, asked.views):
        raise MismatchError(f"{store.path} has {fewer}", remedy=f"give the --views that it has, or {ANOTHER_OUT}")
    differences = _differences(store.schema, asked, teacher, files_changed=bool(changes))
    if differences:
        what = f"{store.path} was made by another command {OWN_AND_NEW}:{in_lines([*differences, *_first(changes)])}"
        raise MismatchError(what, remedy=f"{ANOTHER_OUT}, or repeat the command that made it")
    if changes:
        raise _source_changed(store.path, changes, _remedy(changes))
    if store.schema.source.digest != source_digest(files, asked.source_settings):
        raise _source_changed(store.path, ["the files are given in another order"], _PUT_BACK)


def _differences(schema: EmbeddingStore, asked: Asked, teacher: TeacherIdentity, *, files_changed: bool) -> list[str]:
    """A line for each setting of the store, and each fact of its teacher, that is not what is asked for."""
    own_views, new_views = _of_views(schema.views), _of_views(asked.views)
    if own_views and new_views:  # more views may be added; the strength of strong views says nothing beside crops
        both = (own_views.keys() & new_views.keys()) - {"views.count"}
        own_views, new_views = ({name: views[name] for name in both} for views in (own_views, new_views))
    own = {**_flat(schema.source.settings), **own_views}
    new = {**_flat(asked.source_settings), **new_views}
    names = ["kind", "batch_size", "pixels", "decoder"]
    if not (asked.shard_rows_derived and files_changed):  # else it differs because of the files, which are named
        names.append("shard_rows")
    own |= {name: getattr(schema, name) for name in names}
    new |= {name: getattr(asked, name) for name in names}
    settings = sorted(differing(own, new).items())
    return [
        *(f"{name}: {values}" for name, values in settings),
        *(f"teacher.{difference}" for difference in schema.teacher.differences(teacher)),
    ]


def _of_views(plan: ViewPlan | None) -> dict[str, object]:
    """What --views, --augment and --mixup decide, by name; all of it None without views."""
    if plan is None:
        return {}
    facts = {"count": plan.count, "seed": plan.seed, "crop_scale": list(plan.crop_scale), "flip": plan.flip}
    facts |= {"augment": plan.augment, "mixup": plan.mixup, **(to_plain(plan.strong) if plan.strong else {})}
    return {f"views.{name}": value for name, value in facts.items()}


def _fewer_views(own: ViewPlan | None, asked: ViewPlan | None) -> str | None:
    """What to say where fewer views are asked for than there are of this kind."""
    if own is None or asked is None or asked.count >= own.count or replace(asked, count=own.count) != own:
        return None
    return f"{own.count} views of each image, and {asked.count} are asked for: none is taken away"


def _source_changed(path: str, changes: list[str], remedy: str) -> MismatchError:
    return MismatchError(
        f"the source of {path} has changed since it was planned:{in_lines(_first(changes))}", remedy=remedy
    )


def _remedy(changes: list[str]) -> str:
    if all(change.endswith(" is gone") for change in changes):
        return "put the files back, or leave their rows out by --accept-missing"
    if all(change.endswith(" is new") for change in changes):
        return (
            "name only the files that it was planned from, for example FOLDER/**/*.jpg in place of FOLDER (from which "
            f"more kinds of files are read than in older releases), or {ANOTHER_OUT} for all of them"
        )
    return _PUT_BACK


def _first(changes: list[str]) -> list[str]:
    """A line for each of the first changed files, and one with the number of the others."""
    lines = [f"source: {inert_text.line(change)}" for change in sorted(changes)[:_SHOWN]]
    if len(changes) > _SHOWN:
        lines.append(f"source: and {len(changes) - _SHOWN:,} more")
    return lines


def source_digest(files: Sequence[SourceFile], settings: dict[str, object]) -> str:
    """sha256 over the path and size of every file, in order, and the settings of the source."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\n".encode())
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _changes(store: Store, files: Sequence[SourceFile]) -> list[str]:
    """A phrase for each file that is not as it was when the plan was made, such as "/a.tar is gone"."""
    before = {file["path"]: SourceFile(**file) for file in store.source_files().to_pylist()}
    now = {file.path: file for file in files}
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is gone" for name in before if name not in now]
    return changes + [
        found for name in before.keys() & now.keys() if (found := describe_change(before[name], now[name]))
    ]


def arguments_there(out: str, arguments: Sequence[str | Source[Any]]) -> tuple[str | Source[Any], ...]:
    """The arguments without those whose files are gone, if the store at `out` was planned from these arguments. Raises
    AbsentError if it was not: then a path may be mistyped."""
    found: list[str | Source[Any]] = []
    for argument in arguments:
        found += existing_names(argument) if isinstance(argument, str) else [argument]
    if found == list(arguments) or (is_planned(out) and Store(out).schema.source.arguments == names_of(arguments)):
        return tuple(found)
    for path in paths_of(arguments):
        expand(path)  # raises AbsentError
    return tuple(arguments)  # it is back by now: a plan without it would never get it


def with_gone(store: Store, files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files of a source and, in their old places, those of the plan that are gone, as they were then."""
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
