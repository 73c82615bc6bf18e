"""Who writes to a store: the few facts that another command may show, and nothing that may be secret."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import click


def this_process(**more: object) -> bytes:
    """This process, as JSON. Only the name of its command is given: the rest of the command line may hold keys."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    context = click.get_current_context(silent=True)
    facts = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "user": user,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": context.command_path if context else Path(sys.argv[0]).name or "python",
    }
    return json.dumps({**facts, **more}).encode()


def show_owner(content: bytes) -> str:
    """What `this_process` returned, in words. Anyone may have written the file, so characters that could control a
    terminal become a question mark."""
    try:
        facts = json.loads(content)
        place = f"process {facts['process']} of {facts['user']} on {facts['host']}"
        words = f"{place} since {facts['since']}: {facts['command']}"
        return "".join(letter if letter.isprintable() else "?" for letter in words)
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another process"
