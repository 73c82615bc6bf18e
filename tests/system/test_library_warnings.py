"""Warnings of libraries that cannot help are not shown, and all others are."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import logging, sys, warnings
from dimefm.system.library_warnings import silence
silence()
assert "torch" not in sys.modules
warnings.warn_explicit("This DataLoader will create 6 worker processes in total.", UserWarning, "a.py", 1,
                       "torch.utils.data.dataloader")
warnings.warn_explicit("a DataLoader of ours", UserWarning, "a.py", 2, "torch.utils.data.dataloader")
warnings.warn_explicit("This DataLoader will create 6 worker processes in total.", UserWarning, "a.py", 3, "other")
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME=%s", "/usr")
logging.getLogger("torch.utils.cpp_extension").warning("another line")
"""


def test_only_the_listed_ones_are_silenced() -> None:
    shown = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True).stderr
    assert [line for line in shown.splitlines() if not line.startswith(" ")] == [
        "a.py:2: UserWarning: a DataLoader of ours",
        "a.py:3: UserWarning: This DataLoader will create 6 worker processes in total.",
        "another line",
    ]
