"""The versions of the libraries that decide the numbers in our files."""

from __future__ import annotations

import platform
from importlib.metadata import version

from dimefm.version import __version__


def versions() -> dict[str, str]:
    """By name, the version of each library that decides the numbers in our files, of Python, and of dimefm."""
    packages = ("torch", "open_clip_torch", "zarr", "numpy")
    # dimefm's own comes from the package itself, which also runs from a checkout without being installed.
    own = {"python": platform.python_version(), "dimefm": __version__}
    return {**own, **{name: version(name) for name in packages}}
