"""`dimefm info`: describe what dimefm wrote at a place, on one screen or for a program.

What describes a kind of thing is imported where one is found: a run needs other libraries than a store.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, cast

from cache_schemas.index import BUILD
from dimefm.inspection.description import Description
from dimefm.inspection.kinds import Kind, folders_with_results, require_kind
from dimefm.system import storage

_DESCRIBES = {
    Kind.RUN: "describe_model.describe_run",
    Kind.INDEX: "describe_retrieval.describe_index",
    Kind.UNFINISHED_INDEX: "describe_retrieval.describe_unfinished_index",
    Kind.SELECTION: "describe_retrieval.describe_selection",
    Kind.IMAGE_SELECTION: "describe_image_selection.describe_image_selection",
    Kind.LEAKS: "describe_image_selection.describe_text_leaks",
    Kind.EXPORT: "describe_export.describe_export",
    Kind.MODEL: "describe_model.describe_model",
    Kind.SET: "describe_evaluation.describe_labelled_set",
    Kind.STORE: "describe_store.describe_store",
    Kind.PAIRS: "describe_retrieval.describe_pairs",
    Kind.EMBEDDINGS: "describe_evaluation.describe_embeddings",
    Kind.EVALUATIONS: "describe_evaluation.describe_evaluations",
    Kind.LATENCY: "describe_latency.describe_latency",
}
"""What describes a kind: a module of this room and its function."""


def describe(path: str) -> str:
    """A few lines about what dimefm wrote at `path`. Raises StoreError where it wrote nothing there."""
    return examine(path).show()


def examine(path: str) -> Description:
    """What dimefm wrote at `path`, or a labelled set. Raises StoreError where there is neither."""
    kind = require_kind(path, "info")
    given: list[Any] = []
    if kind == Kind.EVALUATIONS:
        given = [folders_with_results(path)]
    elif kind == Kind.UNFINISHED_INDEX:
        given = [sum(name.endswith(".json") for name in storage.listing(storage.join(path, BUILD)))]
    module, function = _DESCRIBES[kind].split(".")
    return cast(Description, getattr(import_module(f"dimefm.inspection.{module}"), function)(path, *given))


def list_failures(path: str) -> Iterator[dict[str, Any]]:
    """Each row of a store that has no embedding: `row`, `key`, `status`, `file`, `reason`."""
    from dimefm.inspection.describe_store import failures_of

    return failures_of(path)
