"""Commands on a CPU with freed memory kept (dimefm/system/allocator.py), and given back as glibc does by default."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.measure import machine, median, table
from dimefm.sample import sample_dir
from dimefm.system.machine import describe

_GIVEN_BACK = {"MALLOC_TOP_PAD_": str(128 * 1024)}  # glibc's own value; a variable set by the user leaves all to glibc


@dataclass
class _Spent:
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)


@click.command()
@click.option("--count", default=3, show_default=True, help="Rounds.")
@click.option("--rows", default=600, show_default=True, help="Images that the teacher encodes.")
def allocator(count: int, rows: int) -> None:
    """Seconds, CPU seconds and the system's part of them, of commands that run a network on a CPU."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in _commands(Path(folder), rows).items():
            both = {"given back": _Spent(), "kept": _Spent()}
            for number in range(count):
                for how, spent in both.items():
                    out = Path(folder) / f"{name}-{how}-{number}"
                    _run([*words, "--out", str(out)], _GIVEN_BACK if how == "given back" else {}, spent)
            before, after = both.values()
            ratio = median([a / b for a, b in zip(before.seconds, after.seconds, strict=True)])
            lines.append((name, _cell(before), _cell(after), f"{ratio:.2f}"))
    click.echo(table(("command", "given back: s, CPU s, system", "kept", "times as fast"), lines))
    click.echo(f"{machine()}, {describe('cpu')}; medians of {count} rounds; with start-up")


def _commands(folder: Path, rows: int) -> dict[str, list[str]]:
    """The commands by name, without --out. Makes what they read."""
    shipped = sample_dir()
    teacher = f"local-dir:{shipped / 'teacher'}"
    cache = ["cache-images", str(shipped / "images"), "--teacher", teacher, "--limit", str(rows), "--device", "cpu"]
    store = str(folder / "first.zarr")
    _run([*cache, "--pixels", "72", "--out", store], {}, _Spent())
    train = ["train-student", "--images", store, "--recipe", "best", "--device", "cpu", "--threads", "1"]
    return {
        "cache-images, one worker": [*cache, "--workers", "1"],
        "evaluate the teacher": ["evaluate", teacher, str(shipped / "eval" / "caltech101"), "--device", "cpu"],
        "train resnet10t at 64 px": [
            *train, "--student", "resnet10t", "--image-size", "64", "--batch-size", "64", "--max-steps", "30",
        ],
        "train ViT-B-32": [*train, "--student", "ViT-B-32", "--image-size", "224", "--max-steps", "2"],
    }  # fmt: skip


def _run(words: list[str], setting: dict[str, str], spent: _Spent) -> None:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "dimefm", *words, "--quiet"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    subprocess.run(command, env={**plain, **setting}, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent.seconds.append(time.perf_counter() - start)
    spent.system.append(after.ru_stime - before.ru_stime)
    spent.cpu.append(spent.system[-1] + after.ru_utime - before.ru_utime)


def _cell(spent: _Spent) -> str:
    seconds, cpu, system = median(spent.seconds), median(spent.cpu), median(spent.system)
    return f"{seconds:.1f}, {cpu:.1f}, {system / cpu:.0%}"
