"""A small disk for tests, to be full or read-only; see the fixture `disk`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, of a size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")

    def options(self, options: str) -> None:
        """`size=4m`, or `ro`."""
        self._mount("-o", f"remount,{options}")

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)

    def _mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words, str(self.path)], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
