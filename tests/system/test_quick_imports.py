"""Imports of a command's process: without the search for cycles, which is on again afterwards."""

import gc
import sys
from pathlib import Path

import pytest

from dimefm.system import quick_imports


@pytest.mark.parametrize("ends", ["", "raise ImportError"])
def test_a_large_library_is_imported_without_the_search_for_cycles(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_one.py").write_text(
        f"import gc\nENABLED = gc.isenabled()\nmade = [[] for _ in range(9)]\n{ends}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(quick_imports, "_LARGE", ("large_one",))
    quick_imports.import_quickly()
    quick_imports.import_quickly()
    assert sum(isinstance(finder, quick_imports._Finder) for finder in sys.meta_path) == 1
    try:
        if ends:
            with pytest.raises(ImportError):
                __import__("large_one")
        else:
            assert __import__("large_one").ENABLED is False
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        sys.modules.pop("large_one", None)
