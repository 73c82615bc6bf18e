"""Where a student comes from: its run and the stores that it was trained on, without any path of this machine."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cache_schemas import Run, SchemaError, TeacherIdentity
from cache_schemas.export import ExportOrigin, ExportSource
from cache_schemas.run import Change, Weights
from dimefm.errors import DimefmError
from dimefm.models.names import FOLDER, HUB
from dimefm.store.joined_store import open_images
from dimefm.system.named_paths import named
from dimefm.training.run_folder import read_run

_NO_NAME = "unnamed"
_NO_PATH = re.compile(rf"{HUB}[\w.-]+/[\w.-]+(@[\w.-]+)?|ViT-[A-Z]/\d+")
"""Names with a slash that are no paths: of the Hub, and of OpenAI's models."""
_DIFFER = " != "  # between the two values of a change


def origin_of(run: str, step: int, weights: Weights, teacher: TeacherIdentity) -> ExportOrigin:
    """The origin of the student of a run folder after `step` steps, with the text tower of `teacher`. Raises
    SchemaError for a damaged run.json."""
    from dimefm.models.hub import repository_of  # imports open_clip

    document = read_run(run)
    config = document.config
    return ExportOrigin(
        student=public(document.student.name),
        teacher=public(teacher.name),
        pretrained=public(teacher.pretrained),
        repository=repository_of(teacher.name, teacher.pretrained),
        teacher_weights=teacher.weights,
        step=step,
        steps=document.steps,
        weights=weights,
        images_seen=step * int(str(config["batch_size"])),
        seed=int(str(config["seed"])),
        config=public(config),
        sources=_sources(run, document),
        versions=document.versions,
        machine=document.machine,
        changes=tuple(
            Change(step=one.step, field=one.field, values=_DIFFER.join(map(public, one.values.split(_DIFFER))))
            for one in document.changes
        ),
        more_teachers=tuple(public(one.name) for one in document.teachers if one != teacher),
    )


def public(value: Any) -> Any:
    """Plain data that may be published: of every path and URL in it the last part alone, which for a URL has neither
    host nor query. What is no path stays, such as the name of a repository of the Hub."""
    if isinstance(value, dict):
        return {name: public(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(one) for one in value]
    if not isinstance(value, str) or _NO_PATH.fullmatch(value):
        return value
    if "::" in value:
        return "::".join(map(public, value.split("::")))
    folder, path = (FOLDER, value.removeprefix(FOLDER)) if value.startswith(FOLDER) else ("", value)
    return folder + _base_name(path)


def _base_name(path: str) -> str:
    if "://" in path:
        path = re.split(r"[?#]", path, maxsplit=1)[0].partition("://")[2].partition("/")[2]
    elif not re.search(r"[/\\]", path):
        return _NO_NAME if path in ("~", ".", "..") else path
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else _NO_NAME


def _sources(run: str, document: Run) -> tuple[ExportSource, ...]:
    config: dict[str, Any] = document.config
    stores = [
        ("image", config["images"], document.images_identity, document.images_data),
        ("text", config["texts"], document.texts_identity, document.texts_data),
        ("caption", config.get("captions"), document.captions_identity, document.captions_data),
    ]
    paths = zip_longest(config.get("more_images", ()), config.get("more_texts", ()))
    for one, (images, texts) in zip(document.more_teachers, paths, strict=True):
        stores.append(("image", images, one.images_identity, one.images_data))
        stores.append(("text", texts, one.texts_identity, one.texts_data))
    return tuple(_source(run, kind, str(path), known, digest) for kind, path, known, digest in stores if known)


def _source(run: str, kind: Any, path: str, identity: str, digest: str | None) -> ExportSource:
    """What is still known of a store that a run was trained on."""
    paths = path.split("::")  # of several stores of images
    names, unknown = [public(one) for one in paths], "its store could not be read when the model was exported"
    store, beside = "::".join(names), [str(Path(run).absolute().parent / name) for name in names]
    for places in (paths, beside):  # a run names its stores as they were typed
        try:
            found = open_images("::".join(named(place, run) for place in places))
            contents = found.contents
        except (DimefmError, SchemaError, OSError):
            continue
        if found.schema.identity != identity or digest not in (None, contents.digest):
            unknown = "its store had other content when the model was exported"
            continue
        sources = tuple(public(one) for one in found.schema.source.arguments)
        return ExportSource(kind=kind, store=store, names=sources, rows=contents.good, digest=digest)
    return ExportSource(kind=kind, store=store, digest=digest, unknown=unknown)
