"""How long a person waits: until a command's first line, and until its end, in a small first session.

The commands that compute work on 150 images, 1,000 sentences and the sample's teacher; their outputs are removed before
each round. Another release is measured with --tree, the folder of its clone.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.chaos.jobs import make_inputs
from benchmarks.measure import machine, table
from dimefm.sample import sample_dir

IMAGES, SENTENCES, LABELLED = 150, 1000, 60
_TEACHER = f"--teacher local-dir:{sample_dir() / 'teacher'}"
_STORES = "--images images.zarr --texts texts.zarr"
_TRAIN = f"train-student {_STORES} --out run --recipe sample --max-steps 20 --log-every 10"

COMPUTING = (
    (f"cache-images images {_TEACHER} --out images.zarr", "images.zarr"),
    (f"cache-texts texts.txt {_TEACHER} --out texts.zarr", "texts.zarr"),
    (f"cache-images images {_TEACHER} --out other.zarr --dry-run", ""),
    ("build-index texts.zarr --out texts.index --accept", "texts.index"),
    ("retrieve images.zarr --texts texts.zarr --out pairs.zarr", "pairs.zarr"),
    ("select-texts pairs.zarr --out texts.selection", "texts.selection"),
    ("search texts.zarr --text 'a photo of a dog'", ""),
    (_TRAIN, "run"),
    ("export run --out student", "student"),
    ("evaluate student eval --name student", "evaluations/student"),
    ("evaluate run eval --name run", "evaluations/run"),
)
"""Commands that run a model or search, in the order of the work, each with what it writes."""

LOOKING = (
    "--help", "--version", "train-student --help", "train-student --fields", "sets", "sets cifar10",
    "info images.zarr", "info texts.index", "info pairs.zarr", "info texts.selection", "info run",
    "verify images.zarr", "compare evaluations/student evaluations/run", "doctor",
)  # fmt: skip
"""Commands that only read a few documents, or nothing."""

MISTAKES = (
    "cache-images nothing-here --out x.zarr --teacher ViT-B-32 --pretrained openai",
    "cache-images images --out x.zarr --teacher ViT-B32 --pretrained openai",
    "cache-images images --out x.zarr --teacher local-dir:nowhere",
    "cache-images images --out run --teacher ViT-B-32 --pretrained openai",
    "cache-images images --out x.zarr",
    "build-index nothing.zarr --out y.index",
    "retrieve images.zarr --texts nothing.zarr --out y.zarr",
    "search texts.zarr",
    "select-texts nothing.zarr --out y.selection",
    f"train-student {_STORES} --out y --set lr_=1",
    f"train-student {_STORES} --out y --set epochs=many",
    f"train-student {_STORES} --out y --student resnet81",
    f"train-student {_STORES} --out y --epochs 0",
    "train-student --images nothing.zarr --texts texts.zarr --out y",
    "export nothing --out z",
    "evaluate nothing eval",
    "evaluate student nothing",
    "compare nothing",
    "info nothing",
    "verify nothing",
    "train",
)
"""Commands that end with an error about what was typed."""


@dataclass
class Waited:
    """Seconds until the first line was shown and until the end; the exit code and what was shown."""

    first: float
    end: float
    code: int
    shown: str


@click.command()
@click.option("--count", default=5, show_default=True, help="Rounds; medians are printed.")
@click.option("--tree", type=click.Path(exists=True, file_okay=False), default=".", help="Clone that is measured.")
@click.option("--only", default="", help="Measure only commands that contain this.")
@click.option("--keep", help="Folder to leave the session in. Default: a temporary one.")
def start_up(count: int, tree: str, only: str, keep: str | None) -> None:
    """Seconds until the first line and until the end of each command, in a small first session."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or temporary)
        make_inputs(folder, images=IMAGES, sentences=SENTENCES, labelled=LABELLED)
        rows = []
        for kind, commands in (
            ("computes", COMPUTING),
            ("looks", tuple((words, "") for words in LOOKING)),
            ("mistake", tuple((words, "") for words in MISTAKES)),
        ):
            for words, out in commands:
                rows += _row(kind, words, out, folder, Path(tree).resolve(), count, measured=only in words)
    click.echo(table(("", "command", "first line, s", "end, s", "exit code"), rows))
    click.echo(f"{machine()}; medians of {count}")


def _row(
    kind: str, words: str, out: str, folder: Path, tree: Path, count: int, *, measured: bool
) -> list[tuple[str, ...]]:
    """A row of the table. What is not measured runs once, if another command may need what it writes."""
    if not measured and (not out or (folder / out).exists()):
        return []
    runs = []
    for _ in range(count if measured else 1):
        if out:
            shutil.rmtree(folder / out, ignore_errors=True)
        runs.append(run(words, folder, tree))
    if not measured:
        return []
    first, end = (statistics.median(getattr(one, name) for one in runs) for name in ("first", "end"))
    short = words.replace(str(sample_dir()), "SAMPLE")
    return [(kind, f"`{short}`", f"{first:.2f}", f"{end:.2f}", "/".join(sorted({str(one.code) for one in runs})))]


def run(words: str, folder: Path, tree: Path) -> Waited:
    """Run `dimefm WORDS` of the clone `tree` in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dimefm", *shlex.split(words)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    first = time.perf_counter() - began
    rest = process.stdout.read()
    code = process.wait()
    return Waited(first, time.perf_counter() - began, code, (line + rest).decode())
