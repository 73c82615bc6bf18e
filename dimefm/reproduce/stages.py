"""`make reproduce`: the whole job, command by command as a user would type it, and a report at the end.

python -m dimefm.reproduce --scale sample     the shipped sample: two students from one cache, in about ten minutes
python -m dimefm.reproduce --scale smoke      a small part of it, to see that everything works
python -m dimefm.reproduce --scale paper      the paper's job, on the data that --images, --texts and --val name
"""

from __future__ import annotations

import multiprocessing
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import click

from cache_schemas import SchemaError
from cache_schemas.latency import LATENCY_FILE
from dimefm.errors import DimefmError, StoppedError
from dimefm.reproduce.paper_cost import paper_cost_table
from dimefm.reproduce.report import write_report
from dimefm.reproduce.tables import EVALUATIONS, Student
from dimefm.sample import sample_dir
from dimefm.system import stopping, storage
from dimefm.system.gpu_rates import measured_rates
from dimefm.system.inert_text import say, text
from dimefm.system.progress import duration

_STAGES = multiprocessing.get_context("forkserver")
# These import what takes seconds: torch, open_clip, zarr.
_LIBRARIES = ["dimefm.training.train", "dimefm.evaluation.evaluator"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The data of a job and the students that it trains; `latency` are options of `dimefm latency`. `seconds` is how
    long each stage took on some machine, from which the time left is estimated."""

    teacher: tuple[str, ...]
    images: tuple[str, ...]
    texts: tuple[str, ...]
    val: tuple[str, ...]
    students: tuple[Student, ...]
    latency: tuple[str, ...] = ("--batch", "1,64")
    seconds: dict[str, float] = field(default_factory=dict)


PAPER_STUDENT = Student(name="paper", label="the paper's losses", recipe="paper", grounded=True)


def sample_scale() -> Scale:
    """The whole shipped sample, with two students: one trained with the paper's losses on visually grounded sentences,
    and one trained as is best at this size. Each must reach a multiple of chance in top-1, as proof that it learned."""
    root = sample_dir()
    paper = {"cifar10": 3.5, "caltech101": 5.0}
    best = {"cifar10": 3.5, "caltech101": 8.0}
    return Scale(
        teacher=("--teacher", f"local-dir:{root / 'teacher'}"),
        images=(str(root / "images"),),
        texts=(str(root / "texts"),),
        val=(str(root / "eval" / "cifar10"), str(root / "eval" / "caltech101")),
        students=(
            Student(name="paper", label="the paper's losses", recipe="sample-paper", grounded=True, bars=paper),
            Student(name="best", label="best at this size", recipe="sample", bars=best),
        ),
        seconds=_SAMPLE_SECONDS,
    )


_SAMPLE_SECONDS = {
    "cache-images": 45.0, "cache-texts": 24.0, "cache-prompts": 1.3, "build-index": 5.4, "retrieve": 3.6,
    "select-texts": 0.9, "train paper": 51.0, "export paper": 1.3, "evaluate paper": 1.9, "train best": 58.0,
    "export best": 1.3, "evaluate best": 1.7, "evaluate teacher": 16.0,
    "latency": 34.0,
}  # fmt: skip


def smoke_scale() -> Scale:
    """The last of the sample's tars, a fifth of its sentences and one epoch: everything runs, nothing is learned."""
    whole = sample_scale()
    texts = sample_dir() / "texts"
    return Scale(
        teacher=whole.teacher,
        images=(str(sample_dir() / "images" / "train-00005.tar"),),
        texts=(str(texts / "visual_gcc_validation.txt.gz"),),
        val=whole.val[1:],
        students=tuple(
            Student(name=s.name, label=s.label, recipe=s.recipe, grounded=s.grounded, options=("--epochs", "1"))
            for s in whole.students
        ),
        latency=("--batch", "1", "--seconds", "0.2"),
    )


def commands(scale: Scale, out: Path) -> list[tuple[str, list[str]]]:
    """The stages of the job: the name of each, and its `dimefm` command line."""
    images, texts, prompts = (str(out / name) for name in ("images.zarr", "texts.zarr", "prompts.zarr"))
    index, pairs, grounded = (str(out / name) for name in ("texts.index", "pairs.zarr", "texts.selection"))
    stores = ["--images", images, "--texts", texts]
    validation = [word for path in scale.val for word in ("--val", path)] + ["--val-texts", prompts]
    teacher = scale.teacher[1:]  # `evaluate` takes the model's name as its argument
    evaluation = ["--predictions", "--skip-existing", "--out", str(out / EVALUATIONS)]
    stages = [
        ("cache-images", ["cache-images", *scale.images, "--out", images, *scale.teacher]),
        ("cache-texts", ["cache-texts", *scale.texts, "--out", texts, *scale.teacher]),
        ("cache-prompts", ["cache-texts", *scale.val, "--out", prompts, *scale.teacher]),
        ("build-index", ["build-index", texts, "--out", index, "--queries", images]),
        ("retrieve", ["retrieve", images, "--texts", texts, "--index", index, "--top-k", "16", "--out", pairs]),
        ("select-texts", ["select-texts", pairs, "--out", grounded]),
    ]
    for student in scale.students:
        run, folder = str(student.run(out)), str(out / f"student-{student.name}")
        drawn = ["--selection", grounded, "--text-mix", "selected=1"] if student.grounded else []
        recipe = ["--recipe", student.recipe, *student.options]
        stages += [
            (f"train {student.name}", ["train-student", *stores, *drawn, "--out", run, *recipe, *validation]),
            (f"export {student.name}", ["export", run, "--out", folder]),
            (f"evaluate {student.name}", ["evaluate", folder, *scale.val, *evaluation, "--name", student.name]),
        ]
    models = [*(str(out / f"student-{student.name}") for student in scale.students), ":".join(teacher[::2])]
    return [
        *stages,
        ("evaluate teacher", ["evaluate", *teacher, *scale.val, *evaluation, "--name", "teacher"]),
        ("latency", ["latency", *models, *scale.latency, "--out", str(out / LATENCY_FILE)]),
    ]


def run_all(stages: list[tuple[str, list[str]]], out: Path, expected: dict[str, float] | None = None) -> None:
    """Run every stage. Before each, print its command and how far the whole job is.

    stages.json keeps the seconds that each stage took when it first ran; null for a stage that was stopped and resumed,
    because no time would be fair. `expected` are the seconds of each stage on some machine. Raises DimefmError if a
    stage fails, StoppedError if it was stopped by a signal.
    """
    record = str(out / "stages.json")
    seconds: dict[str, float | None] = storage.read_json(record) if storage.exists(record) else {}
    began, pace = time.monotonic(), _Pace(expected or {})
    for number, (name, words) in enumerate(stages, 1):
        left = pace.left([name for name, _ in stages[number - 1 :]])
        spent = duration(time.monotonic() - began)
        say(f"\n[{number} of {len(stages)}] {name}: {spent} so far{left}")
        say(f"$ {shlex.join(['dimefm', *words])}")
        first = name not in seconds
        storage.write_json(record, {**seconds, name: seconds.get(name)})
        stage_began = time.monotonic()
        code = run_stage(words)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            remedy = "the same command goes on from there"
            raise StoppedError(f"the job was stopped in {name}", signal=code - 128, remedy=remedy)
        if code:
            raise DimefmError(f"{name} failed with exit code {code}", remedy="mend what it says, and run this again")
        took = time.monotonic() - stage_began
        pace.add(name, took)
        seconds[name] = round(took, 1) if first else seconds[name]
        storage.write_json(record, seconds)


class _Pace:
    """Estimates the time left, from how long the finished stages took here and how long they were expected to take."""

    def __init__(self, expected: dict[str, float]) -> None:
        self._expected = expected
        self._took = self._planned = 0.0

    def add(self, name: str, seconds: float) -> None:
        self._took += seconds
        self._planned += self._expected.get(name, seconds)

    def left(self, names: list[str]) -> str:
        if any(name not in self._expected for name in names):
            return ""
        rest = sum(self._expected[name] for name in names)
        return f", about {duration(rest * (self._took / self._planned if self._planned else 1))} left of all"


def run_stage(words: list[str]) -> int:
    """Run one command in a process of its own and return its exit code. The process is forked from one that has
    imported the libraries, which saves each of a dozen commands some seconds."""
    _STAGES.set_forkserver_preload(_LIBRARIES)
    process = _STAGES.Process(target=_dimefm, args=(words,))
    process.start()
    with _signals_passed_to(process):
        process.join()
    code = process.exitcode
    assert code is not None
    return 128 - code if code < 0 else code  # as a shell reports a signal


def _dimefm(words: list[str]) -> None:
    from dimefm.cli import main

    sys.argv = ["dimefm", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()


@contextmanager
def _signals_passed_to(process: BaseProcess) -> Iterator[None]:
    """For the block, let a stage end in its own way, and this process after it. Ctrl-C reaches all processes in a
    terminal by itself; SIGTERM is passed on."""

    def terminate(*_: object) -> None:
        stopping.took()
        process.terminate()

    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--scale", "name", type=click.Choice(["smoke", "sample", "paper"]), default="sample", show_default=True)
@click.option("--out", "folder", help="Folder for everything. Default: runs/SCALE.")
@click.option("--images", multiple=True, help="Scale paper: image sources.")
@click.option("--texts", multiple=True, help="Scale paper: text sources.")
@click.option("--val", multiple=True, help="Scale paper: labelled sets.")
@click.option("--teacher", default="ViT-L-14-quickgelu", show_default=True, help="Scale paper: open_clip name.")
@click.option("--pretrained", default="openai", show_default=True, help="Scale paper: its weights.")
@click.option("--dry-run", is_flag=True, help="Print the commands, and for scale paper the cost.")
def main(
    name: str,
    folder: str | None,
    images: tuple[str, ...],
    texts: tuple[str, ...],
    val: tuple[str, ...],
    teacher: str,
    pretrained: str,
    dry_run: bool,
) -> None:
    """Run the whole DIME-FM job. If it is stopped, run the same command again: it goes on where it was."""
    if name == "paper":
        if not dry_run and not (images and texts and val):
            raise click.UsageError("scale paper needs --images, --texts and --val (or --dry-run)")
        scale = Scale(
            teacher=("--teacher", teacher, "--pretrained", pretrained),
            images=images or ("IMAGES",),
            texts=texts or ("TEXTS",),
            val=val or ("VAL",),
            students=(PAPER_STUDENT,),
        )
    else:
        scale = smoke_scale() if name == "smoke" else sample_scale()
    try:
        out = Path(storage.local(folder, "the folder of a whole job")) if folder else Path("runs") / name
        stages = commands(scale, out)
        if dry_run:
            for _, words in stages:
                say(f"$ {shlex.join(['dimefm', *words])}")
            if name == "paper":
                say("\n" + paper_cost_table(images, texts, measured_rates()))
            return
        run_all(stages, out, scale.seconds)
        report = write_report(out, scale.students)
    except StoppedError as error:
        say(f"Stopped: {error}", err=True)
        sys.exit(128 + error.signal)
    except (DimefmError, SchemaError) as error:
        raise click.ClickException(text(error)) from error
    say("\n" + report.text)
    if report.missed:
        raise click.ClickException(f"below the bar: {', '.join(report.missed)}")
