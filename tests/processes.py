"""Processes for tests, forked from one that has imported the heavy libraries: they begin at once, with nothing of
pytest's process in them. And how the processes that they start in turn are found."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MARK = {"DIMEFM_TEST": uuid.uuid4().hex}
"""Ours among all processes of the machine: whoever is started with this environment has it, Ray's workers too."""

FORKING = multiprocessing.get_context("forkserver")
# Without Ray, which takes its settings from the environment as it is imported.
FORKING.set_forkserver_preload(
    [
        "dimefm.training.train",
        "dimefm.training.recipes",
        "dimefm.retrieval.index_build",
        "dimefm.retrieval.retrieve",
        "dimefm.selection.select_texts",
        "dimefm.export.export_student",
        "dimefm.evaluation.evaluator",
        "dimefm.caching.plan",
        "dimefm.inspection.verify",
    ]
)


class Gate:
    """Where processes wait until a test lets them go on, so that it can do what it has to at just this moment, however
    fast or slow the machine is. All Pythons started with its `environment` are held by it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._link = folder, folder / "closed"
        folder.mkdir()
        self.environment = {"DIMEFM_TEST_GATE": str(folder), "PYTHONPATH": _with_gate()}

    def close(self, *, at: str) -> None:
        """Hold whoever comes to `at`, a pattern such as "open */005.jpg" (see tests/gate/sitecustomize.py). Those who
        wait where it was closed before go on, and may be the next to come."""
        for path in self._folder.glob("[0-9]*"):
            path.unlink()
        new = self._link.with_name("new")
        new.symlink_to(at)
        new.replace(self._link)

    def open(self) -> None:
        """Let all go on."""
        self._link.unlink(missing_ok=True)

    def waiting(self) -> set[int]:
        """The ids of those who have come since it was closed."""
        return {int(path.name) for path in self._folder.glob("[0-9]*")}


class Crash:
    """An image that crashes its decoder: all Pythons started with this `environment` die of SIGSEGV where they open a
    file whose path fits the pattern; where it begins with "memory ", they ask for 64 GiB there."""

    def __init__(self, pattern: str) -> None:
        self.environment = {"DIMEFM_TEST_CRASH": pattern, "PYTHONPATH": _with_gate()}


def _with_gate() -> str:
    return os.pathsep.join([str(Path(__file__).parent / "gate"), *filter(None, [os.environ.get("PYTHONPATH")])])


class Command:
    """A `dimefm` command at work, on one thread; held at a `gate`, where there is one, or crashing. `prepare` of a
    test module is called in its process before. With `apart` it leads a process group, as a command in a terminal."""

    def __init__(
        self,
        words: list[str],
        gate: Gate | Crash | None = None,
        prepare: Callable[[], object] | None = None,
        *,
        apart: bool = False,
    ) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as output:
            self._output = Path(output.name)
        weakref.finalize(self, self._output.unlink)
        environment = {**os.environ, **MARK, "OMP_NUM_THREADS": "1", **(gate.environment if gate else {})}
        self._process = FORKING.Process(target=_dimefm, args=(words, str(self._output), environment, prepare, apart))
        self._process.start()

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def output(self) -> str:
        """All that it has printed until now."""
        return self._output.read_text()

    def wait_until(self, due: Callable[[], object], seconds: float = 240) -> None:
        """Fails where the command ends before, since then nothing is tested."""
        end = time.monotonic() + seconds
        while not due():
            assert not self.ended(), f"ended before its time: {self.output()}"
            assert time.monotonic() < end, "waited for too long"
            time.sleep(0.01)

    def kill_when(self, due: Callable[[], object]) -> None:
        """SIGKILL as soon as `due`."""
        self.wait_until(due)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        """A signal to the process alone."""
        os.kill(self.pid, number)

    def send_to_all(self, number: int) -> None:
        """A signal to the process and to all that it has started, as a terminal sends Ctrl-C; needs `apart`."""
        os.killpg(self.pid, number)

    def finish(self, code: int = 0, seconds: float = 240) -> str:
        """Wait until it ends, with this exit code; what it has printed."""
        self._process.join(seconds)
        assert self._process.exitcode == code, self.output()
        return self.output()


def _dimefm(
    words: list[str], output: str, environment: dict[str, str], prepare: Callable[[], object] | None, apart: bool
) -> None:
    import torch

    from dimefm.cli import main

    if apart:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    with Path(output).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    import tests.gate.sitecustomize  # noqa: F401  # which this process, being forked, has not loaded

    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for this process, but not for Ray's
    if prepare:
        prepare()
    sys.argv = ["dimefm", *words]
    main()


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
