"""What kind of CPU this is, without torch."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = ("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
_INSTRUCTIONS_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")


def processor_name() -> str:
    """The name of the CPU as it gives it itself, else that of its architecture."""
    found = re.search(r"^model name\s*: (.+)$", _info(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def instructions() -> tuple[str, ...]:
    """The vector instructions that decide how fast products are, of those that the CPU has."""
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", _info(), re.MULTILINE)
    has = set(found[1].split()) if found else set()
    return tuple(name for name in (*_INSTRUCTIONS, *_INSTRUCTIONS_ARM) if name in has)


def load() -> float | None:
    """How many cores were busy in the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _info() -> str:
    return _INFO.read_text(encoding="utf-8", errors="replace") if _INFO.exists() else ""
