"""Who writes to a store: the few facts that another command is told, and nothing that may be a secret."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import click


def owner(**more: object) -> bytes:
    """This process, as JSON. Of its command line only which command it is: the rest may hold keys."""
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
    """What `owner` gave, in words; a file of others may hold anything, and a terminal obeys some of it."""
    try:
        facts = json.loads(content)
        place = f"process {facts['process']} of {facts['user']} on {facts['host']}"
        words = f"{place} since {facts['since']}: {facts['command']}"
        return "".join(letter if letter.isprintable() else "?" for letter in words)
    except (ValueError, KeyError, TypeError):  # it is just writing who it is
        return "another process"
