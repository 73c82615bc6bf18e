"""The versions of the libraries that decide what is written."""

from __future__ import annotations

import platform
from importlib.metadata import version

from dimefm.version import __version__


def versions() -> dict[str, str]:
    """Versions of what decides the numbers that are written."""
    packages = ("torch", "open_clip_torch", "zarr", "numpy")
    # dimefm's own is asked of the package: it runs from a checkout too, without being installed.
    own = {"python": platform.python_version(), "dimefm": __version__}
    return {**own, **{name: version(name) for name in packages}}
