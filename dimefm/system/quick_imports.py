"""Imports of large libraries in the process of a command, without the work that no command needs of them.

- Python's search for cycles runs over all objects again and again while they are made: a fifth of the time.
- timm imports wandb, and open_clip imports transformers, if they are installed: a quarter of the rest. Both go on
  without them. Code that needs one imports it itself. Only open_clip's text towers of Hugging Face want transformers
  from the start: models.hub.with_transformers gives it to them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

HIDDEN: dict[str, tuple[str, ...]] = {"torch": (), "timm": ("wandb",), "open_clip": ("transformers", "wandb")}
"""Libraries that are imported this way, each with those that it does not find meanwhile."""


def import_quickly() -> None:
    """Import the libraries of HIDDEN this way from now on. For a process of our own only: in that of another program,
    open_clip is whatever that program expects."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds a library where Python does, and changes how its first lines are run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in HIDDEN else None
        loader: Any = spec.loader if spec else None
        if loader is not None:
            loader.exec_module = _quick(loader.exec_module, HIDDEN[fullname])
        return spec


def _quick(run: Callable[[ModuleType], None], hidden: tuple[str, ...]) -> Callable[[ModuleType], None]:
    def run_quickly(module: ModuleType) -> None:
        with _no_search_for_cycles():
            try:
                with _hiding(hidden):
                    run(module)
            except ImportError:  # another release cannot do without them
                run(module)

    return run_quickly


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """A block of imports. What they made stays until the process ends, and is not searched later either."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.freeze()
            gc.enable()


@contextmanager
def _hiding(names: tuple[str, ...]) -> Iterator[None]:
    """A block in which some libraries are not found, as if they were not installed; later they are."""
    absent: Any = None  # how Python marks a module that is not to be found
    mine = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(mine, absent))
    try:
        yield
    finally:
        for name in mine:
            del sys.modules[name]
