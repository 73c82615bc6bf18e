"""A command that serves pages, as a program of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile

_BEGIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
from dimefm.__main__ import main
main()
"""


class Serving:
    """A `dimefm` command that has said its `url`; to be used in a `with` block, at whose end it is killed."""

    def __init__(self, *words: str, importtime: bool = False) -> None:
        python = [sys.executable, *(["-X", "importtime"] if importtime else [])]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe that nobody reads would be full
        self.process = subprocess.Popen(
            [*python, "-c", _BEGIN, *words], stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.errors()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rstrip("/").rpartition(":")[2])

    def errors(self) -> str:
        """What it has said on its standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def stop(self, number: int) -> tuple[int, str]:
        """Send it a signal, and wait; its exit code, and what it has said on its standard error."""
        self.process.send_signal(number)
        self.process.communicate(timeout=10)
        return self.process.returncode, self.errors()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()
