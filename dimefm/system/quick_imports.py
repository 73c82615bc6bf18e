"""Imports of large libraries without Python's search for cycles, which otherwise runs over all of their objects again
and again while these are made: a sixth of the time of importing torch and open_clip."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_LARGE = ("torch", "timm", "open_clip")


def import_quickly() -> None:
    """Import large libraries this way from now on. For a command's process alone: it changes how Python imports."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds a library where Python does, and runs its first lines without the search."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in _LARGE else None
        loader: Any = spec.loader if spec else None
        if loader is not None:
            run = loader.exec_module
            loader.exec_module = lambda module: _without_search(run, module)
        return spec


def _without_search(run: Any, module: ModuleType) -> None:
    """Run the lines of a module. What they made stays until the process ends, and is not searched later either."""
    before = gc.isenabled()
    gc.disable()
    try:
        run(module)
    finally:
        if before:
            gc.freeze()
            gc.enable()
