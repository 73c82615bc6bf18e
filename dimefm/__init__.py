"""Distil a large CLIP into a small student from unpaired images and sentences (DIME-FM, ICCV 2023).

The public face, for use from Python. Each name is imported when it is first asked for: `import dimefm` costs nothing.

>>> from dimefm import CacheConfig, cache, TrainConfig, train, EvaluationConfig, evaluate
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dimefm.version import __version__

if TYPE_CHECKING:
    from dimefm.evaluation.config import EvaluationConfig
    from dimefm.evaluation.evaluate import evaluate
    from dimefm.retrieval.build_index import IndexConfig, build_index
    from dimefm.retrieval.retrieve import retrieve
    from dimefm.selection.select_texts import SelectionConfig, select_texts
    from dimefm.store.embedding_store import Store
    from dimefm.training.config import LossConfig, TextMix, TrainConfig
    from dimefm.training.recipes import paper
    from dimefm.training.train import train
    from pipeline.cache import CacheConfig, cache

_HOMES = {
    "CacheConfig": "pipeline.cache",
    "cache": "pipeline.cache",
    "IndexConfig": "dimefm.retrieval.build_index",
    "build_index": "dimefm.retrieval.build_index",
    "retrieve": "dimefm.retrieval.retrieve",
    "SelectionConfig": "dimefm.selection.select_texts",
    "select_texts": "dimefm.selection.select_texts",
    "TrainConfig": "dimefm.training.config",
    "LossConfig": "dimefm.training.config",
    "TextMix": "dimefm.training.config",
    "paper": "dimefm.training.recipes",
    "train": "dimefm.training.train",
    "EvaluationConfig": "dimefm.evaluation.config",
    "evaluate": "dimefm.evaluation.evaluate",
    "Store": "dimefm.store.embedding_store",
}

__all__ = [
    "CacheConfig",
    "EvaluationConfig",
    "IndexConfig",
    "LossConfig",
    "SelectionConfig",
    "Store",
    "TextMix",
    "TrainConfig",
    "__version__",
    "build_index",
    "cache",
    "evaluate",
    "paper",
    "retrieve",
    "select_texts",
    "train",
]


def __getattr__(name: str) -> object:
    """Import what is asked for, from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dimefm' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
