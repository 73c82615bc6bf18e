"""Faults in the file system and kills, for every library of a process: the Python side of faults.c. Linux only."""

import ctypes
import errno
import mmap
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import click

ALL, WRITES, INPUTS = 0, 1, 2
"""Which calls a fault counts, as in faults.c."""

_ONCE, _FROM_THEN_ON, _KILL = 1, 2, 3


@dataclass(frozen=True)
class Fault:
    """What happens at one of the calls of a command, or from it on: `error` is that of every such call. Without one all
    processes of the command are killed there, as when the power fails."""

    name: str
    calls: int
    error: int = 0
    stays: bool = False

    @property
    def action(self) -> int:
        return (_FROM_THEN_ON if self.stays else _ONCE) if self.error else _KILL


KILL = Fault("all processes killed at a call", ALL)
ERRORS = (
    Fault("a call fails: EIO", ALL, errno.EIO),
    Fault("a write fails: EIO", WRITES, errno.EIO),
    Fault("the disk is full from a write on", WRITES, errno.ENOSPC, stays=True),
    Fault("the inputs are gone: ENOENT", INPUTS, errno.ENOENT, stays=True),
    Fault("the inputs are refused: EACCES", INPUTS, errno.EACCES, stays=True),
    Fault("the inputs' mount is stale: ESTALE", INPUTS, errno.ESTALE, stays=True),
)


class _Block(ctypes.Structure):
    """`struct control` of faults.c."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("armed", "action", "range", "at", "error", "leader")),
        ("counts", ctypes.c_long * 3),
    ]  # fmt: skip


class Faults:
    """The library, built in `folder`, and the memory by which it is told what to do. Its environment has to be that of
    every process that is to see faults, from its start."""

    def __init__(self, folder: Path, root: Path) -> None:
        library, control = folder / "faults.so", folder / "control"
        source = Path(__file__).with_name("faults.c")
        try:
            words = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
            subprocess.run(words, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise click.ClickException(f"faults.c cannot be compiled: {error}; it needs a C compiler") from error
        control.write_bytes(bytes(ctypes.sizeof(_Block)))
        with control.open("r+b") as file:
            self._block = _Block.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(_Block)))
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_ROOT": str(root), "CHAOS_CONTROL": str(control)}

    def arm(self, fault: Fault | None, at: int = 0) -> None:
        """Count from now on, and let `fault` come at its call number `at`, from 1."""
        self._block.armed, self._block.action = 0, 0
        self._block.counts[:] = [0, 0, 0]
        if fault:
            self._block.range, self._block.at, self._block.error = fault.calls, at, fault.error
            self._block.action = fault.action
        self._block.leader = 0
        self._block.armed = 1

    def lead(self, process: int) -> None:
        """The first process of the command: a kill is of that one too."""
        self._block.leader = process

    def disarm(self) -> list[int]:
        """No fault any more; the calls since `arm`: all, those that write, those about inputs."""
        self._block.armed = 0
        return list(self._block.counts)
