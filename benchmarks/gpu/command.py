"""`python -m benchmarks gpu`: the steps in order of worth, each in its share of the time."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.gpu import running
from benchmarks.gpu.results import Results, Step
from benchmarks.gpu.sizes import GPU, SMALL
from dimefm.errors import DimefmError
from dimefm.system.machine import choose_device, wait_briefly

_END = 5.0  # seconds kept back to write and to clean up


@dataclass(frozen=True)
class Part:
    """A step as it is planned: its function, and its share of the time in seconds of nine minutes."""

    letter: str
    name: str
    function: str
    share: float


PARTS = (
    Part("a", "Facts", "facts:facts", 25),
    Part("b", "Correctness", "correctness:correctness", 75),
    Part("t", "Tests marked gpu", "marked:marked_tests", 30),
    Part("c", "Stage 1, images", "encoding:images", 130),
    Part("d", "Stage 1, sentences", "sentences:sentences", 25),
    Part("e", "Exact search", "searching:searching", 45),
    Part("f", "Training", "training:training", 90),
    Part("g", "The cache against the teacher in the loop", "training:online", 20),
    Part("i", "Several processes", "ranks:ranks", 30),
    Part("j", "Quality", "quality:quality", 70),
)  # h, the peaks of memory, is a line of every step


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True,
              help="cpu runs the same code on tiny models: no number means anything.")  # fmt: skip
@click.option("--minutes", default=9.0, show_default=True, help="For everything, the start of processes included.")
@click.option("--only", metavar="LETTERS", help="Steps, such as a,b,c. Default: all.")
def gpu(out: Path, device: str, minutes: float, only: str | None) -> None:
    """Prove and measure dimefm on a GPU: results.json, results.md, rates.json and log.txt in --out."""
    began = time.monotonic()
    chosen = _chosen(only)
    wait_briefly()
    running.prepare()
    try:
        choose_device(device)
    except DimefmError as error:
        raise click.ClickException(str(error)) from error
    words = ["python", "-m", "benchmarks", "gpu", "--device", device, "--minutes", f"{minutes:g}"]
    command = shlex.join([*words, *(["--only", only] if only else [])])
    results = Results(out, command, minutes)
    results.card = "" if device == "cuda" else "A CPU with tiny models: no number means anything"
    (out / "log.txt").write_text("")
    sizes = GPU if device == "cuda" else SMALL
    running.ready()
    until = time.monotonic()
    per_share = (began + 60 * minutes - _END - until) / sum(part.share for part in chosen)
    with tempfile.TemporaryDirectory(prefix="dimefm-gpu-", ignore_cleanup_errors=True) as folder:
        for part in chosen:
            until += part.share * per_share  # what the steps before have not used is this one's too
            step = Step(part.letter, part.name)
            running.run(
                f"benchmarks.gpu.{part.function}", step, results, device=device, sizes=sizes, folder=Path(folder),
                log=out / "log.txt", until=until,
            )  # fmt: skip
            seconds, state = step.seconds, step.state if step.passed else f"{step.state}, NOT PASSED"
            click.echo(f"{part.letter}. {part.name}: {state} in {seconds:.0f} s, {len(step.lines)} lines", err=True)
    click.echo(results.summary())
    sys.stdout.flush()
    if not results.passed:
        sys.exit(1)


def _chosen(only: str | None) -> list[Part]:
    letters = [part.letter for part in PARTS] if only is None else only.replace(" ", "").split(",")
    unknown = set(letters) - {part.letter for part in PARTS}
    if unknown:
        known = ", ".join(part.letter for part in PARTS)
        raise click.UsageError(f"--only: no step {', '.join(sorted(unknown))}; there are {known}")
    return [part for part in PARTS if part.letter in letters]
