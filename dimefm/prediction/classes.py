"""The classes to choose from, and their embeddings.

Shapes: C classes, M prompts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dimefm.errors import DimefmError, SourceError
from dimefm.prediction.config import PredictConfig
from dimefm.sources.prompts import CLASSNAMES, DEFAULT_TEMPLATE, prompt, read_entries, read_template_file
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.notes import note
from dimefm.system.progress import Progress

_BATCH = 64  # prompts that go through the text tower at a time
_SOON = 512  # prompts that take a few seconds at most: no progress is shown


class Classes(NamedTuple):
    """Names, each of them once, and the templates of their prompts."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


def read_classes(config: PredictConfig) -> Classes:
    """The classes that are asked for. One that is named twice counts once, and a note says so. Raises SourceError for a
    file that cannot be read, and for names that are empty."""
    if config.classes_from:
        given = read_entries(_file(config.classes_from), _instead(config.classes_from, "with a class on each line"))
    else:
        given = [" ".join(name.split()) for name in config.classes]
        if "" in given:
            what = "--classes has an empty name"
            raise SourceError(what, remedy="separate names by single commas, and put a list with spaces in quotes")
    names = tuple(dict.fromkeys(given))
    for name in names:
        if (count := given.count(name)) > 1:
            note(f"the class {name!r} is named {count} times, and counts once")
    if len(names) == 1 and not config.classes_from and Path(names[0]).is_file():
        raise SourceError(f"{names[0]} is a file, not a class", remedy=f"give --classes-from {names[0]}")
    templates = [DEFAULT_TEMPLATE]
    if config.templates:
        templates = read_template_file(
            _file(config.templates),
            _instead(config.templates, "with a prompt on each line, {c} for the class"),
        )
    return Classes(names, tuple(templates))


def _file(path: str) -> str:
    """The path of a file. Raises SourceError for a local folder."""
    if not storage.is_url(path) and Path(path).is_dir():
        inside = Path(path, CLASSNAMES)
        raise SourceError(f"{path} is a folder", remedy=f"name {inside if inside.exists() else 'a file'}")
    return storage.absolute(path)


def _instead(path: str, what: str) -> str:
    return did_you_mean_path(path, f"give a file {what}")


def embed_classes(classes: Classes, encode: Callable[[list[str]], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """float32 (C, D): of each class the mean over its prompts, normalised again, as `evaluate` has it. `encode` gives
    unit-norm embeddings of sentences. Raises DimefmError where they are not finite."""
    prompts = [prompt(template, name) for name in classes.names for template in classes.templates]
    found = []
    with Progress("encoding", len(prompts), "prompt") if len(prompts) > _SOON else nullcontext() as progress:
        for start in range(0, len(prompts), _BATCH):
            found.append(encode(prompts[start : start + _BATCH]))
            if progress:
                progress.at(min(start + _BATCH, len(prompts)))
    prompts_MD = np.concatenate(found).astype(np.float64)
    sums_CD = prompts_MD.reshape(len(classes.names), len(classes.templates), -1).sum(axis=1)
    means_CD: np.ndarray[Any, Any] = (sums_CD / np.linalg.norm(sums_CD, axis=1, keepdims=True)).astype(np.float32)
    if not np.isfinite(means_CD).all():
        raise DimefmError("the model's embeddings of the classes are not finite", remedy="export another checkpoint")
    return means_CD
