"""`dimefm info`: describe what dimefm wrote at a place, on one screen or for a program.

What describes a kind of thing is imported where one is found: a run needs other libraries than a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from cache_schemas import EmbeddingStore, PairsStore
from cache_schemas.embedding_store import ATTRIBUTES_KEY
from cache_schemas.evaluation import RESULTS_FILE, SPLITS
from cache_schemas.export import EXPORT_FILE
from cache_schemas.index import BUILD, SIDECAR_FILE
from cache_schemas.run import CONFIG_FILE, RUN_FILE
from cache_schemas.text_selection import PLAN_FILE
from dimefm.errors import SourceError, StoreError
from dimefm.inspection.description import Description
from dimefm.sources.prompts import CLASSNAMES
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path

_LOOKED_AT, _NAMED = 50, 4
_BY_FILE = {
    RUN_FILE: "describe_model.describe_run",
    SIDECAR_FILE: "describe_retrieval.describe_index",
    PLAN_FILE: "describe_retrieval.describe_selection",
    EXPORT_FILE: "describe_export.describe_export",
    CONFIG_FILE: "describe_model.describe_model",
    CLASSNAMES: "describe_evaluation.describe_labelled_set",
}
"""What describes a folder, by the file that marks its kind: a module of this room and its function."""

_BY_SCHEMA = {
    EmbeddingStore.SCHEMA: "describe_store.describe_store",
    PairsStore.SCHEMA: "describe_retrieval.describe_pairs",
}
"""The same for Zarr groups, by their attributes."""

_ELSE = "give the --out of one of dimefm's commands"


def describe(path: str) -> str:
    """A few lines about what dimefm wrote at `path`. Raises StoreError where it wrote nothing there."""
    return examine(path).show()


def examine(path: str) -> Description:
    """What dimefm wrote at `path`, or a labelled set. Raises StoreError where there is neither."""
    found = _description_of(path) or _class_folders(path)
    if found is None:
        raise _nothing(path)
    return found()


def list_failures(path: str) -> Iterator[dict[str, Any]]:
    """Each row of a store that has no embedding: `row`, `key`, `status`, `file`, `reason`."""
    from dimefm.inspection.describe_store import failures_of

    return failures_of(path)


def _description_of(path: str) -> Callable[[], Description] | None:
    """What describes `path`, by the files that mark each kind; None where there is none of them."""
    names = storage.listing(path)
    for name, describes in _BY_FILE.items():
        if name in names:
            return partial(_call, describes, path)
    if "zarr.json" in names:
        schema: Any = storage.read_json(storage.join(path, "zarr.json"))
        for key in ("attributes", ATTRIBUTES_KEY, "schema"):
            schema = schema.get(key) if isinstance(schema, dict) else None
        return partial(_call, _BY_SCHEMA[schema], path) if str(schema) in _BY_SCHEMA else None
    if BUILD in names and (steps := [n for n in storage.listing(storage.join(path, BUILD)) if n.endswith(".json")]):
        return partial(_call, "describe_retrieval.describe_unfinished_index", path, len(steps))
    if "metadata" in names and {"img_emb", "text_emb"} & set(names):
        return partial(_call, "describe_evaluation.describe_embeddings", path)
    folders = [path] if RESULTS_FILE in names else _with_results(path, names)
    return partial(_call, "describe_evaluation.describe_evaluations", path, folders) if folders else None


def _class_folders(path: str) -> Callable[[], Description] | None:
    """What describes a labelled set without classnames.txt: folders of images, one for each class."""
    if storage.is_url(path) or not Path(path).is_dir():
        return None
    from dimefm.datasets.own_sets import find_folder

    with suppress(SourceError):
        if any(find_folder(path, split) for split in SPLITS):
            return partial(_call, _BY_FILE[CLASSNAMES], path)
    return None


def _with_results(path: str, names: list[str]) -> list[str]:
    """The folders of models in EVALUATIONS, which is local."""
    folders = [] if storage.is_url(path) else [Path(path, name) for name in names]
    return [str(folder) for folder in folders if (folder / RESULTS_FILE).is_file()]


def _call(describes: str, *given: Any) -> Description:
    module, function = describes.split(".")
    return cast(Description, getattr(import_module(f"dimefm.inspection.{module}"), function)(*given))


def _nothing(path: str) -> StoreError:
    """The error for a place where nothing can be described: what is there, and what was probably meant."""
    if not storage.exists(path):
        return StoreError(f"{path} does not exist", remedy=did_you_mean_path(path, _ELSE))
    names = storage.listing(path)
    if not names:
        return _no_folder(path)
    shown = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED:,} more" if names[_NAMED:] else "")
    inside = [one for name in names[:_LOOKED_AT] if _description_of(one := storage.join(path, name))]
    remedy = " or ".join(f"dimefm info {one}" for one in inside[:_NAMED]) or _around(path)
    return StoreError(f"{path} is nothing that dimefm wrote: it holds {shown}", remedy=remedy)


def _no_folder(path: str) -> StoreError:
    """The error for an empty folder, or a file: of a run, an index and so on its folder is described."""
    if storage.is_url(path) or Path(path).is_dir():
        return StoreError(f"{path} is empty", remedy=_ELSE)
    return StoreError(f"{path} is a file, and info describes folders", remedy=_around(path))


def _around(path: str) -> str:
    """A remedy for a part of a run, an index or the like: to describe the whole."""
    folders = [] if storage.is_url(path) else [str(folder) for folder in Path(path).parents[:2]]
    return next((f"dimefm info {folder}" for folder in folders if _description_of(folder)), _ELSE)
