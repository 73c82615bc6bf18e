"""What `info` knows of results of evaluations, of a labelled set, and of a folder of embeddings of clip-retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas.evaluation import SPLITS
from dimefm.datasets.own_sets import find_folder, set_name
from dimefm.evaluation.results import read_results
from dimefm.exchange.clip_retrieval_folder import FOLDERS, Folder
from dimefm.inspection.description import Description, Rows
from dimefm.system import storage
from dimefm.system.progress import amount
from dimefm.system.wording import counted


def describe_evaluations(path: str, folders: list[str]) -> Description:
    """The results of models: of all in EVALUATIONS, or of one in its own folder. `folders` are theirs."""
    models: list[dict[str, Any]] = [{"name": set_name(folder), "results": _results(folder)} for folder in folders]
    facts = {"artefact": "evaluations", "path": storage.absolute(path), "finished": True, "models": models}
    rows = [(model["name"], words) for model in models for words in _result_lines(model["results"], len(models) == 1)]
    rows.append(("compare with", f"dimefm compare {' '.join(folders[:2])}{' ...' if len(folders) > 2 else ''}"))
    return Description(f"{path}: results of {counted(len(models), 'model')}", facts, rows)


def _results(folder: str) -> list[dict[str, Any]]:
    results = read_results(folder)
    names = ("set", "suite", "protocol", "metric", "value", "images", "partial", "finished")
    return [{name: getattr(result, name) for name in names} for result in results]


def _result_lines(results: list[dict[str, Any]], in_full: bool) -> list[str]:
    """A line for each result; or, where there are several models, their sets and protocols in one."""
    if in_full:
        return [
            f"{one['set']}: {one['protocol']}, {one['metric']} {one['value']:.4f}, {counted(one['images'], 'image')}"
            for one in results
        ]
    sets, protocols = (list(dict.fromkeys(one[name] for one in results)) for name in ("set", "protocol"))
    return [f"{counted(len(results), 'result')}; sets: {', '.join(sets)}; protocols: {', '.join(protocols)}"]


def describe_labelled_set(path: str) -> Description:
    """A labelled set of the user's."""
    found = {split: images for split in SPLITS if (images := find_folder(path, split)) is not None}
    first = next(iter(found.values()), None)
    facts: dict[str, Any] = {
        "artefact": "labelled-set",
        "path": storage.absolute(path),
        "finished": True,
        "name": set_name(path),
        "splits": {
            split: {"images": len(images.samples), "layout": images.layout, "notes": list(images.notes)}
            for split, images in found.items()
        },
        "classes": list(first.classnames) if first else [],
        "templates": list(first.templates) if first else [],
    }
    return Description(f"{path}: labelled set", facts, _set(facts))


def _set(facts: dict[str, Any]) -> Rows:
    classes, templates = facts["classes"], facts["templates"]
    rows = [(split, f"{counted(one['images'], 'image')}, {one['layout']}") for split, one in facts["splits"].items()]
    rows += [("note", note) for one in facts["splits"].values() for note in one["notes"]]
    some = f"{', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}"
    return [
        *(rows or [("images", "none that evaluate would read")]),
        ("classes", f"{len(classes):,}: {some}"),
        ("templates", f"{len(templates):,}{f', such as {templates[0]}' if templates else ''}"),
        ("measure on it", f"dimefm evaluate MODEL {facts['path']}"),
    ]


def describe_embeddings(path: str) -> Description:
    """A folder as clip-retrieval and `export-embeddings` write it."""
    kinds = [kind for kind, name in FOLDERS.items() if storage.exists(storage.join(path, name))]
    parts: list[dict[str, Any]] = []
    for kind in kinds:
        folder = Folder(path, kind)
        dtype = str(np.load(folder.parts[0].vectors, mmap_mode="r").dtype)
        size = sum(Path(part.vectors).stat().st_size for part in folder.parts)
        parts.append(
            {"kind": kind, "rows": folder.rows, "dim": folder.dim, "dtype": dtype, "files": len(folder.parts),
             "bytes": size}
        )  # fmt: skip
    facts = {"artefact": "embeddings", "path": storage.absolute(path), "finished": True, "parts": parts}
    rows = [
        (f"{part['kind']}s", f"{part['rows']:,} x {part['dim']:,} {part['dtype']}, {counted(part['files'], 'file')} of "
         f"{amount(part['bytes'])}")
        for part in parts
    ]  # fmt: skip
    rows.append(("make a store", f"dimefm import-embeddings {facts['path']} --kind {kinds[0]} --teacher NAME"))
    return Description(f"{path}: embeddings as clip-retrieval writes them", facts, rows)
