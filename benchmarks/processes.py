"""A command as it runs for a user, with the CPU time and memory of all its processes, Ray's among them.

Every process inherits an environment variable by which it is known; /proc is read a few times a second. Linux only.
"""

import os
import re
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

_TAG = "DIMEFM_BENCHMARK"
_TICKS = os.sysconf("SC_CLK_TCK")
_EVERY = 0.2
_SIZES = re.compile(r"^(Pss|Pss_Anon): +(\d+) kB", re.MULTILINE)


@dataclass
class Usage:
    """Seconds of wall clock; CPU seconds by kind of process ("work": Ray's workers or the command itself, "rest": the
    driver and Ray's own where there are workers); memory of all together, bytes, at each reading, and that
    without the pages of files, which the system takes back when it needs them."""

    wall: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    @property
    def total_cpu(self) -> float:
        return sum(self.cpu.values())


def run(words: list[str], *, memory: bool = False, environment: dict[str, str] | None = None) -> Usage:
    """Run a command to its end. Raises RuntimeError with its last lines where it fails."""
    tag = uuid.uuid4().hex
    usage, seen = Usage(), dict[int, tuple[str, float]]()
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words,
            env={**os.environ, **(environment or {}), _TAG: tag},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            _read(tag, seen)
            if memory:
                found = [_pss(pid) for pid in seen]
                usage.memory.append((time.perf_counter() - began, sum(whole for whole, _ in found)))
                usage.own.append(sum(own for _, own in found))
            time.sleep(_EVERY)
        usage.wall = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(words)} failed:\n{output.read()[-2000:]}")
    for kind, seconds in seen.values():
        usage.cpu[kind] = usage.cpu.get(kind, 0.0) + seconds
    return usage


def _read(tag: str, seen: dict[int, tuple[str, float]]) -> None:
    """CPU seconds so far of every process that carries the tag, the highest value that was read of each."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            parts = (entry / "stat").read_text().rpartition(")")[2].split()
            # A process that sets its title writes over its environment: then it is known by its parent.
            known = pid in seen or int(parts[1]) in seen
            if not known and f"{_TAG}={tag}".encode() not in (entry / "environ").read_bytes():
                continue
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        working = title.startswith(b"ray::Worker") or seen.get(pid, ("", 0.0))[0] == "work"
        kind = "work" if working else "rest"
        seen[pid] = (kind, (int(parts[11]) + int(parts[12])) / _TICKS)


def _pss(pid: int) -> tuple[int, int]:
    """The memory of a process, and the part of it that is no file's."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    sizes = {name: int(size) * 1024 for name, size in _SIZES.findall(text)}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0)
