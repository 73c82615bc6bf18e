"""Commands that are killed, or whose files fail, at any moment: run again, they must give the same bytes."""

import collections
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.chaos.faults import ERRORS, INPUTS, KILL, Fault, Faults
from benchmarks.chaos.jobs import JOBS, Job, facts, make_inputs
from benchmarks.measure import machine, table

_FORKING = multiprocessing.get_context("forkserver")
_LIBRARIES = [
    "dimefm.train", "dimefm.recipes", "dimefm.building", "dimefm.retrieval", "dimefm.selection", "dimefm.export",
    "dimefm.evaluation.suite", "pipeline.plan", "pipeline.verify", "pipeline.importing",
]  # fmt: skip
_LONGEST = 300.0  # seconds of a command that hangs


@dataclass
class Result:
    """How a command ended. `code` is negative where a signal ended it, None where it did not end."""

    code: int | None
    text: str
    calls: list[int]
    seconds: float


class Runner:
    """Runs jobs, each in a process group of its own, forked from a process that has imported the libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.root.mkdir()
        (self.root / "tmp").mkdir()
        self.faults = Faults(folder, self.root)
        os.environ |= self.faults.environment | {"OMP_NUM_THREADS": "1"}
        _FORKING.set_forkserver_preload(_LIBRARIES)
        from multiprocessing import forkserver

        forkserver.ensure_running()
        for name in self.faults.environment:
            del os.environ[name]

    def run(
        self, job: Job, out: Path, fault: Fault | None = None, at: int = 0, kill_after: float | None = None
    ) -> Result:
        """The job with its results below `out`. With a fault, or one of its processes killed after some seconds."""
        out.mkdir(exist_ok=True)
        places = {"in": self.root / "inputs", "ref": self.root / "undisturbed", "out": out}
        words = [word.format(**places) for word in job.words.split()]
        output = self.folder / "output.txt"
        self.faults.arm(fault, at)
        began = time.monotonic()
        process = _FORKING.Process(target=_dimefm, args=(words, str(output), str(self.root / "tmp")))
        process.start()
        assert process.pid
        self.faults.lead(process.pid)
        if kill_after is not None:
            process.join(kill_after)
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(random.choice(_group(process.pid)), signal.SIGKILL)
        process.join(_LONGEST)
        code = process.exitcode
        calls = self.faults.disarm()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        _await_ray()
        return Result(code, output.read_text(errors="replace"), calls, time.monotonic() - began)


def _dimefm(words: list[str], output: str, temporary: str) -> None:
    os.setsid()
    with Path(output).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    os.environ["RAY_TMPDIR"] = "/tmp"
    import torch

    torch.set_num_threads(1)
    from dimefm.cli import main

    sys.argv = ["dimefm", *words]
    main()


def _group(leader: int) -> list[int]:
    """All processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[2] == str(leader):
                found.append(int(entry.name))
    return found or [leader]


def _await_ray() -> None:
    """Until Ray's processes of a killed command are gone; they notice it themselves."""
    for _ in range(600):
        titles = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                titles.append((entry / "cmdline").read_bytes() if entry.name.isdigit() else b"")
        if not any(b"faults.so" in title or title.startswith(b"ray::Worker") for title in titles):
            return
        time.sleep(0.1)


def judge(first: Result, again: Result | None, same: bool) -> str:
    """What became of a command that was struck and then run again: "the same" or what is wrong."""
    if first.code is None:
        return "HANGS"
    if first.code > 0 and "Traceback" in first.text:
        return "NO CLEAR ERROR"
    if first.code == 1 and not re.search(r"^Error: .+", first.text, re.M):
        return "NO CLEAR ERROR"
    if first.code == 0 and not same and again is None:
        return "WRONG RESULT, and exit code 0"
    if again and again.code is None:
        return "HANGS when run again"
    if again and again.code:
        return "REFUSED when run again" if "Traceback" not in again.text else "NO CLEAR ERROR when run again"
    return "the same" if same else "WRONG RESULT when run again"


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=100, show_default=True, help="Of kills, and of faults each.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", help="Only the job of this name.")
@click.option("--round", "one", type=int, help="Only this round of them, to see what it printed.")
def chaos(rounds: int, seed: int, only: str | None, one: int | None) -> None:
    """Strike every command at random moments, run it again, and compare all bytes with an undisturbed run's.

    Half of the rounds are SIGKILLs: of all processes at a random call of the file system, or of one process after a
    random time. The others are faults in the calls of all its libraries: an error once, a disk that is full from some
    write on, inputs that vanish or are refused. Exits with 1 where a result differs or an error is not clear.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        failed = _rounds(Runner(Path(name)), rounds, seed, only, one)
    if failed:
        sys.exit(1)


def _rounds(runner: Runner, rounds: int, seed: int, only: str | None, one: int | None) -> bool:
    reference = runner.root / "undisturbed"
    make_inputs(runner.root / "inputs")
    expected, usual = {}, {}
    for job in JOBS:
        undisturbed = runner.run(job, reference)
        again = runner.run(job, runner.root / "again")
        if undisturbed.code or again.code:
            raise click.ClickException(f"{job.name} fails undisturbed:\n{undisturbed.text}\n{again.text}")
        expected[job.name], usual[job.name] = facts(reference / job.out), undisturbed
        difference = _difference(expected[job.name], facts(runner.root / "again" / job.out))
        if difference:
            raise click.ClickException(f"{job.name} gives other bytes at each run: {difference}")
        shutil.rmtree(runner.root / "again")
        click.echo(f"{job.name}: {undisturbed.seconds:.1f} s, {undisturbed.calls[0]:,} calls", err=True)
    inputs = facts(runner.root / "inputs")
    found: dict[str, collections.Counter[str]] = {}
    wrong = False
    for number in range(2 * rounds):
        rng = random.Random(f"{seed}/{number}")
        job = rng.choices(JOBS, [job.share for job in JOBS])[0]
        fault = KILL if number % 2 == 0 else rng.choice(ERRORS)
        after = rng.uniform(0, usual[job.name].seconds) if number % 4 == 0 else None
        if fault.calls == INPUTS and not usual[job.name].calls[INPUTS]:
            fault = ERRORS[0]
        at = rng.randint(1, max(1, usual[job.name].calls[fault.calls]))
        if (only and job.name != only) or (one is not None and number != one):
            continue
        out = runner.root / "round"
        what = fault.name if after is None else "a process killed"
        when = f"call {at}" if after is None else f"{after:.2f} s"
        struck = runner.run(job, out, None if after is not None else fault, at, after)
        same = struck.code == 0 and not _difference(expected[job.name], facts(out / job.out))
        again = None
        if struck.code != 0:
            again = runner.run(job, out)
            difference = _difference(expected[job.name], facts(out / job.out)) if again.code == 0 else ""
            same = again.code == 0 and not difference
        verdict = judge(struck, again, same)
        left = _hidden(out)
        if left and verdict == "the same":
            verdict = "LEFTOVERS"
        found.setdefault(f"{job.name} | {what}", collections.Counter())[verdict] += 1
        message = (re.findall(r"^Error: .+", struck.text, re.M) or [""])[0]
        click.echo(f"{number} {job.name}: {what}, {when}: exit code {struck.code}, {verdict} {message}", err=True)
        if verdict != "the same" or one is not None:
            wrong = wrong or verdict != "the same"
            click.echo(f"{struck.text}\n-- again:\n{again.text if again else ''}\n-- {left} "
                       f"{_difference(expected[job.name], facts(out / job.out))}", err=True)  # fmt: skip
        shutil.rmtree(out)
    if facts(runner.root / "inputs") != inputs or any(facts(reference / job.out) != expected[job.name] for job in JOBS):
        raise click.ClickException("an input was changed")
    rows = [(*name.split(" | "), str(sum(c.values())), ", ".join(f"{v}: {n}" for v, n in c.items()))
            for name, c in sorted(found.items())]  # fmt: skip
    click.echo(table(("command", "struck by", "times", "and run again"), rows))
    click.echo(f"\n{machine()}, seed {seed}")
    return wrong


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(expected.keys() | found.keys())
    return ", ".join(name for name in names if expected.get(name) != found.get(name))


def _hidden(out: Path) -> str:
    """Unfinished files that stayed behind after all; a lock may."""
    return ", ".join(str(p.relative_to(out)) for p in out.rglob(".*") if p.name != ".lock")
