"""Notes on stderr about work that goes on: what is being done, how far it is. --quiet mutes them, and progress.

Results, problems and errors are no notes: they are printed by `inert_text.say`, and --quiet leaves them.
"""

from __future__ import annotations

import sys

from dimefm.system.inert_text import text

_muted = False


def mute(muted: bool = True) -> None:
    """Show no notes and no progress from now on in this process, or show them again."""
    global _muted
    _muted = muted


def are_muted() -> bool:
    """Whether notes and progress are muted."""
    return _muted


def note(line: object) -> None:
    """Print a line on stderr, unless notes are muted."""
    if not _muted:
        print(text(line), file=sys.stderr, flush=True)
