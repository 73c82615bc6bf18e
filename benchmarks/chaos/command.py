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

from benchmarks.chaos.faults import ALL, ERRORS, KILL, Fault, Faults
from benchmarks.chaos.jobs import JOBS, Job, facts, make_inputs
from benchmarks.measure import machine, table

_FORKING = multiprocessing.get_context("forkserver")
_LIBRARIES = [
    "dimefm.training.train",
    "dimefm.training.recipes",
    "dimefm.retrieval.index_build",
    "dimefm.retrieval.retrieve",
    "dimefm.selection.select_texts",
    "dimefm.export.export_student",
    "dimefm.evaluation.evaluator",
    "dimefm.caching.plan",
    "dimefm.inspection.verify",
    "dimefm.exchange.import_embeddings",
]
_LONGEST = 300.0  # seconds of a command that hangs
_SAME = "the same"
_MESSAGE = re.compile(r"^Error: .+", re.M)


@dataclass
class Result:
    """How a command ended. `code` is negative where a signal ended it, None where it did not end."""

    code: int | None
    text: str
    calls: list[int]
    seconds: float


@dataclass(frozen=True)
class Usual:
    """A job undisturbed: the digests of what it writes, by file, the calls that it makes, and its seconds."""

    facts: dict[str, str]
    calls: list[int]
    seconds: float


@dataclass(frozen=True)
class Strike:
    """What happens to a job: `fault` at call number `at`, or where `after` is given a kill after so many seconds."""

    fault: Fault
    at: int
    after: float | None

    @property
    def name(self) -> str:
        return self.fault.name if self.after is None else "a process killed"

    @property
    def moment(self) -> str:
        return f"call {self.at}" if self.after is None else f"{self.after:.2f} s"


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

    def run(self, job: Job, out: Path, strike: Strike | None = None) -> Result:
        """The job, with its results below `out`, and what strikes it."""
        out.mkdir(exist_ok=True)
        places = {"in": self.root / "inputs", "ref": self.root / "undisturbed", "out": out}
        words = [word.format(**places) for word in job.words.split()]
        output = self.folder / "output.txt"
        by_call = strike if strike and strike.after is None else None
        self.faults.arm(by_call and by_call.fault, by_call.at if by_call else 0)
        began = time.monotonic()
        process = _FORKING.Process(target=_dimefm, args=(words, str(output), str(self.root / "tmp")))
        process.start()
        assert process.pid
        self.faults.lead(process.pid)
        if strike and strike.after is not None:
            process.join(strike.after)
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(random.choice(_group(process.pid)), signal.SIGKILL)
        process.join(_LONGEST)
        code, seconds = process.exitcode, time.monotonic() - began
        calls = self.faults.disarm()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        _await_ray()
        return Result(code, output.read_text(errors="replace"), calls, seconds)


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
    """Until the workers of a killed command's Ray are gone; they notice it themselves."""
    for _ in range(600):
        titles = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                titles.append((entry / "cmdline").read_bytes() if entry.name.isdigit() else b"")
        if not any(title.startswith(b"ray::") for title in titles):
            return
        time.sleep(0.1)


def judge(first: Result, again: Result | None, same: bool) -> str:
    """What became of a command that was struck, and run `again` if it failed; whether the result is the `same`."""
    if first.code is None:
        return "HANGS"
    if first.code > 0 and "Traceback" in first.text:
        return "NO CLEAR ERROR"
    if first.code == 1 and not _MESSAGE.search(first.text):
        return "NO CLEAR ERROR"
    if first.code == 0 and not same and again is None:
        return "WRONG RESULT, and exit code 0"
    if again and again.code is None:
        return "HANGS when run again"
    if again and again.code:
        return "REFUSED when run again" if "Traceback" not in again.text else "NO CLEAR ERROR when run again"
    return _SAME if same else "WRONG RESULT when run again"


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=100, show_default=True, help="Of kills, and of faults each.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", help="Only the job of this name.")
@click.option("--round", "one", type=int, help="Only this round of them, to see what it printed.")
def chaos(rounds: int, seed: int, only: str | None, one: int | None) -> None:
    """Strike ten commands at random moments, run them again, and compare all bytes with an undisturbed run's.

    Half of the rounds are SIGKILLs: of all processes at a random call of the file system, or of one process after a
    random time. The others are faults in the calls of all its libraries: an error once, a disk that is full from some
    write on, inputs that vanish or are refused. Exits with 1 where a result differs or an error is not clear.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        failed = _rounds(Runner(Path(name)), rounds, seed, only, one)
    if failed:
        sys.exit(1)


def _rounds(runner: Runner, rounds: int, seed: int, only: str | None, one: int | None) -> bool:
    """Whether anything went wrong."""
    make_inputs(runner.root / "inputs")
    usual = {job.name: _undisturbed(runner, job) for job in JOBS}
    inputs, found = facts(runner.root / "inputs"), dict[tuple[str, str], collections.Counter[str]]()
    for number in range(2 * rounds):
        rng = random.Random(f"{seed}/{number}")
        job = rng.choices(JOBS, [job.share for job in JOBS])[0]
        strike = _choose(rng, number, usual[job.name])
        if (only and job.name != only) or (one is not None and number != one):
            continue
        verdict = _round(runner, number, job, strike, usual[job.name].facts, show=one is not None)
        found.setdefault((job.name, strike.name), collections.Counter())[verdict] += 1
    written = ((usual[job.name].facts, facts(runner.root / "undisturbed" / job.out)) for job in JOBS)
    if facts(runner.root / "inputs") != inputs or any(before != now for before, now in written):
        raise click.ClickException("an input was changed")
    rows = [
        (*name, str(counts.total()), ", ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
        for name, counts in sorted(found.items())
    ]
    click.echo(table(("command", "struck by", "times", "and run again"), rows))
    click.echo(f"\n{machine()}, seed {seed}")
    return any(set(counts) != {_SAME} for counts in found.values())


def _undisturbed(runner: Runner, job: Job) -> Usual:
    """The job run twice, which must give the same bytes; the first result is what later jobs read."""
    first = runner.run(job, runner.root / "undisturbed")
    again = runner.run(job, runner.root / "again")
    if first.code or again.code:
        raise click.ClickException(f"{job.name} fails undisturbed:\n{first.text}\n{again.text}")
    found = facts(runner.root / "undisturbed" / job.out)
    if difference := _difference(found, facts(runner.root / "again" / job.out)):
        raise click.ClickException(f"{job.name} gives other bytes at each run: {difference}")
    shutil.rmtree(runner.root / "again")
    click.echo(f"{job.name}: {first.seconds:.1f} s, {first.calls[ALL]:,} calls", err=True)
    return Usual(found, first.calls, first.seconds)


def _choose(rng: random.Random, number: int, usual: Usual) -> Strike:
    """Kills and faults in turn; of kills each second one by the clock."""
    fault = KILL if number % 2 == 0 else rng.choice(ERRORS)
    after = rng.uniform(0, usual.seconds) if number % 4 == 0 else None
    if not usual.calls[fault.calls]:  # a job without inputs of its own
        fault = ERRORS[0]
    return Strike(fault, rng.randint(1, usual.calls[fault.calls]), after)


def _round(runner: Runner, number: int, job: Job, strike: Strike, expected: dict[str, str], *, show: bool) -> str:
    """Strike the job, run it again if it failed, and say what became of it."""
    out = runner.root / "round"
    struck, again = runner.run(job, out, strike), None
    if struck.code != 0:
        again = runner.run(job, out)
    difference = _difference(expected, facts(out / job.out)) if (again or struck).code == 0 else ""
    verdict = judge(struck, again, same=not difference)
    left = _hidden(out)
    if left and verdict == _SAME:
        verdict = "LEFTOVERS"
    message = (_MESSAGE.findall(struck.text) or [""])[0]
    what = f"{number} {job.name}: {strike.name}, {strike.moment}: exit code {struck.code}, {verdict} {message}"
    click.echo(what, err=True)
    if show or verdict != _SAME:
        click.echo(f"{struck.text}\n-- again:\n{again.text if again else ''}\n-- {left} {difference}", err=True)
    shutil.rmtree(out)
    return verdict


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(expected.keys() | found.keys())
    return ", ".join(name for name in names if expected.get(name) != found.get(name))


def _hidden(out: Path) -> str:
    """Unfinished files that stayed behind after all; a lock may."""
    return ", ".join(str(p.relative_to(out)) for p in out.rglob(".*") if p.name != ".lock")
