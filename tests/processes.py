"""Processes for tests, forked from one that has imported the heavy libraries: they begin at once, with nothing of
pytest's process in them. And how the processes that they start in turn are found."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Ours among all processes of the machine: whoever is started with this environment has it, Ray's workers too.
MARK = {"DIMEFM_TEST": uuid.uuid4().hex}
ENVIRONMENT = {**os.environ, **MARK, "OMP_NUM_THREADS": "1"}

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["pipeline.shard", "dimefm.train", "dimefm.recipes", "torch.distributed.nn"])


class Command:
    """A `dimefm` command at work."""

    def __init__(self, words: list[str]) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as output:
            self._output = Path(output.name)
        self._process = FORKING.Process(target=_dimefm, args=(words, str(self._output), ENVIRONMENT))
        self._process.start()

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join()
        self._output.unlink()

    def finish(self) -> None:
        """Wait until it ends; fails where that is not with 0."""
        self._process.join(240)
        output = self._output.read_text()
        self.kill()
        assert self._process.exitcode == 0, output

    def kill_when(self, due: Callable[[], bool]) -> None:
        """SIGKILL as soon as `due`; fails where the command ended before, since then nothing was tested."""
        end = time.monotonic() + 120
        while not due() and time.monotonic() < end:
            assert not self.ended(), f"ended before it could be killed: {self._output.read_text()}"
            time.sleep(0.01)
        self.kill()


def _dimefm(words: list[str], output: str, environment: dict[str, str]) -> None:
    import torch

    from dimefm.cli import cli

    with Path(output).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS is too late for this process
    cli(words, prog_name="dimefm")


def result_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a test module returns, called in a process of its own."""
    here, there = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=_send, args=(there, function, arguments))
    process.start()
    there.close()
    with here:
        result = here.recv()
    process.join()
    return result


def _send(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))


def processes(title: str) -> list[int]:
    """Ids of the processes that tests have started and whose command line begins with `title`."""
    mark = "".join(f"{name}={value}" for name, value in MARK.items()).encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes()
            if ours and (entry / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
