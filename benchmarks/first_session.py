"""A first session as a person sees it: each command typed in a terminal of 80 columns, with the seconds that it took.

`python -m benchmarks first-session --out docs/first-session.md` writes the page of the documents.
"""

import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import click

from benchmarks.chaos.jobs import make_inputs
from benchmarks.measure import machine
from benchmarks.start_up import IMAGES, LABELLED, SENTENCES
from dimefm.sample import sample_dir

COLUMNS = 80
_TEACHER = "--teacher local-dir:teacher"
_TRAIN = "train-student --images IMAGES.zarr --texts TEXTS.zarr --out RUN --recipe sample --epochs 40"
SESSION: tuple[tuple[str, str], ...] = (
    ("What will it take?", f"cache-images images --out IMAGES.zarr {_TEACHER} --dry-run"),
    ("The teacher runs once.", f"cache-images images --out IMAGES.zarr {_TEACHER}"),
    ("", f"cache-texts texts.txt --out TEXTS.zarr {_TEACHER}"),
    ("Is it sane?", "search TEXTS.zarr --text 'a dog on a beach' --top-k 3"),
    ("", "verify IMAGES.zarr"),
    ("Which sentences are worth training on?", "build-index TEXTS.zarr --out TEXTS.index --queries IMAGES.zarr"),
    ("", "retrieve IMAGES.zarr --texts TEXTS.zarr --index TEXTS.index --out PAIRS.zarr"),
    ("", "select-texts PAIRS.zarr --out TEXTS.selection"),
    ("What would train-student do?", "recipes"),
    ("", f"{_TRAIN} --dry-run"),
    ("A slip of the finger.", f"{_TRAIN} --set warmup_epoch=1"),
    ("Ctrl-C after some steps, and the same command again.", f"^C {_TRAIN} --log-every 50"),
    ("", f"{_TRAIN} --log-every 50"),
    ("How good is it?", "evaluate RUN labelled_set"),
    ("", "evaluate local-dir:teacher labelled_set --name teacher"),
    ("", "compare evaluations/RUN evaluations/teacher"),
    ("Take it away.", "export RUN --out STUDENT"),
    ("", "info STUDENT"),
)
"""What a person wants to know, and the command; one that begins with ^C is stopped in its midst."""


@click.command()
@click.option("--out", type=click.Path(dir_okay=False), help="Markdown file to write. Default: print it.")
def first_session(out: str | None) -> None:
    """A transcript of a first session in a terminal of 80 columns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, images=IMAGES, sentences=SENTENCES, labelled=LABELLED)
        (folder / "eval").rename(folder / "labelled_set")
        (folder / "teacher").symlink_to(sample_dir() / "teacher")
        parts = [_HEAD.format(images=IMAGES, sentences=f"{SENTENCES:,}", labelled=LABELLED, machine=machine())]
        for heading, words in SESSION:
            parts += [f"## {heading}\n"] if heading else []
            parts.append(f"```text\n{_transcript(words, folder)}\n```\n")
    text = "\n".join(parts)
    if out:
        Path(out).write_text(text, encoding="utf-8")
    else:
        click.echo(text)


_HEAD = """# A first session

What a person sees who types the commands of the [quickstart](quickstart.md) in a terminal of 80 columns. There are
{images} images, {sentences} sentences, the shipped sample's teacher, and a labelled set of {labelled} images, so the
accuracies mean nothing. The seconds of each command are in brackets. `python -m benchmarks first-session` wrote this
page; {machine}.
"""


def _transcript(words: str, folder: Path) -> str:
    """What the terminal shows of a command: as typed, what it prints, and how it ended."""
    stopped = words.startswith("^C ")
    words = words.removeprefix("^C ")
    began = time.monotonic()
    shown, code = _in_terminal([sys.executable, "-m", "dimefm", *shlex.split(words)], folder, stopped=stopped)
    ended = f"exit code {code}, " if code else ""
    shown = shown.replace(str(folder), "/data")
    return f"$ dimefm {words}\n{shown}\n[{ended}{time.monotonic() - began:.1f} s]"


def _in_terminal(words: list[str], folder: Path, *, stopped: bool) -> tuple[str, int]:
    """What a terminal shows in the end, and the exit code. With `stopped` it gets a Ctrl-C once steps are counted."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm"}
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""
    while True:
        ready, _, _ = select.select([master], [], [], 0.1)
        try:
            read = os.read(master, 65536) if ready else b""
        except OSError:  # the terminal has no other end any more
            break
        shown += read
        if stopped and b": loss " in shown:
            os.killpg(process.pid, signal.SIGINT)
            stopped = False
    os.close(master)
    return _as_seen(shown.decode()), process.wait()


def _as_seen(shown: str) -> str:
    """The lines as they stand in the end: of a line that was written over, what was written last."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.replace("\r\n", "\n")).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines).strip("\n")
