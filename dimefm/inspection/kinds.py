"""What kind of thing is at a place, by the files that mark each kind."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from cache_schemas import EmbeddingStore, PairsStore
from cache_schemas.embedding_store import ATTRIBUTES_KEY
from cache_schemas.evaluation import RESULTS_FILE, SPLITS
from cache_schemas.export import EXPORT_FILE
from cache_schemas.image_selection import ImageSelectionPlan
from cache_schemas.index import BUILD, SIDECAR_FILE
from cache_schemas.latency import LATENCY_FILE, Latency
from cache_schemas.leaks import LEAKS_FILE
from cache_schemas.run import CONFIG_FILE, RUN_FILE
from cache_schemas.text_selection import PLAN_FILE
from dimefm.errors import SourceError, StoreError
from dimefm.sources.prompts import CLASSNAMES
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path

_LOOKED_AT, _NAMED = 50, 4
_MOST_BYTES = 16 << 20  # of a file that may be measurements of latency
_ELSE = "give the --out of one of dimefm's commands"


class Kind(StrEnum):
    """What dimefm writes, or reads."""

    RUN = "run"
    INDEX = "index"
    UNFINISHED_INDEX = "unfinished index"
    SELECTION = "selection"
    IMAGE_SELECTION = "selection of images"
    LEAKS = "leaks"
    EXPORT = "export"
    MODEL = "model"
    SET = "labelled set"
    STORE = "store"
    PAIRS = "pairs"
    EMBEDDINGS = "embeddings"
    EVALUATIONS = "evaluations"
    LATENCY = "latency"


_BY_FILE = {
    RUN_FILE: Kind.RUN,
    SIDECAR_FILE: Kind.INDEX,
    PLAN_FILE: Kind.SELECTION,
    LEAKS_FILE: Kind.LEAKS,
    EXPORT_FILE: Kind.EXPORT,
    CONFIG_FILE: Kind.MODEL,
    CLASSNAMES: Kind.SET,
}
_BY_SCHEMA = {EmbeddingStore.SCHEMA: Kind.STORE, PairsStore.SCHEMA: Kind.PAIRS}


def kind_of(path: str) -> Kind | None:
    """What is at `path`; None where it is nothing of dimefm's."""
    return _marked(path) or (Kind.LATENCY if _is_latency(path) else Kind.SET if _class_folders(path) else None)


def require_kind(path: str, command: str) -> Kind:
    """What is at `path`. Raises StoreError where that is nothing of dimefm's; the remedy names `dimefm COMMAND`."""
    found = kind_of(path)
    if found is None:
        raise _nothing(path, command)
    return found


def folders_with_results(path: str) -> list[str]:
    """The folders of models in EVALUATIONS, or the one that `path` is itself."""
    if RESULTS_FILE in (names := storage.listing(path)):
        return [path]
    folders = [] if storage.is_url(path) else [Path(path, name) for name in names]
    return [str(folder) for folder in folders if (folder / RESULTS_FILE).is_file()]


def _marked(path: str) -> Kind | None:
    names = storage.listing(path)
    for name, kind in _BY_FILE.items():
        if name in names:
            return _of_selection(storage.join(path, name)) if kind == Kind.SELECTION else kind
    if "zarr.json" in names:
        schema: Any = storage.read_json(storage.join(path, "zarr.json"))
        for key in ("attributes", ATTRIBUTES_KEY, "schema"):
            schema = schema.get(key) if isinstance(schema, dict) else None
        return _BY_SCHEMA.get(str(schema))
    if BUILD in names and any(name.endswith(".json") for name in storage.listing(storage.join(path, BUILD))):
        return Kind.UNFINISHED_INDEX
    if "metadata" in names and {"img_emb", "text_emb"} & set(names):
        return Kind.EMBEDDINGS
    return Kind.EVALUATIONS if folders_with_results(path) else None


def _of_selection(plan: str) -> Kind:
    """Whether sentences or images are selected."""
    document = storage.read_json(plan)
    schema = document.get("schema") if isinstance(document, dict) else None
    return Kind.IMAGE_SELECTION if schema == ImageSelectionPlan.SCHEMA else Kind.SELECTION


def _is_latency(path: str) -> bool:
    """Whether it is a file of measurements, whatever it is called; one called latency.json is taken for it unread."""
    if path.rpartition("/")[2] == LATENCY_FILE and storage.exists(storage.absolute(path)):
        return storage.is_url(path) or Path(path).is_file()
    if storage.is_url(path) or not path.endswith(".json") or not Path(path).is_file():
        return False
    with suppress(ValueError, StoreError):
        found: Any = storage.read_json(storage.absolute(path)) if Path(path).stat().st_size <= _MOST_BYTES else None
        return isinstance(found, dict) and found.get("schema") == Latency.SCHEMA
    return False


def _class_folders(path: str) -> bool:
    """Whether it is a labelled set without classnames.txt: folders of images, one for each class."""
    if storage.is_url(path) or not Path(path).is_dir():
        return False
    from dimefm.datasets.own_sets import find_folder

    with suppress(SourceError):
        return any(find_folder(path, split) for split in SPLITS)
    return False


def _nothing(path: str, command: str) -> StoreError:
    """The error for a place where nothing is known: what is there, and what was probably meant."""
    if not storage.exists(path):
        return StoreError(f"{path} does not exist", remedy=did_you_mean_path(path, _ELSE))
    names = storage.listing(path)
    if not names:
        return _no_folder(path, command)
    shown = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED:,} more" if names[_NAMED:] else "")
    inside = [one for name in names[:_LOOKED_AT] if _marked(one := storage.join(path, name))]
    remedy = " or ".join(f"dimefm {command} {one}" for one in inside[:_NAMED]) or _around(path, command)
    return StoreError(f"{path} is nothing that dimefm wrote: it holds {shown}", remedy=remedy)


def _no_folder(path: str, command: str) -> StoreError:
    """The error for an empty folder, or a file: of a run, an index and so on the folder is meant."""
    if storage.is_url(path) or Path(path).is_dir():
        return StoreError(f"{path} is empty", remedy=_ELSE)
    return StoreError(
        f"{path} is a file, and {command} describes folders, and of files {LATENCY_FILE} alone",
        remedy=_around(path, command),
    )


def _around(path: str, command: str) -> str:
    """A remedy for a part of a run, an index or the like: the whole."""
    folders = [] if storage.is_url(path) else [str(folder) for folder in Path(path).parents[:2]]
    return next((f"dimefm {command} {folder}" for folder in folders if _marked(folder)), _ELSE)
