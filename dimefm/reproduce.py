"""`make reproduce`: the whole job as a user would type it, command by command, ending in one table and a report.

python -m dimefm.reproduce --scale sample     the shipped sample, about ten minutes on two CPU cores
python -m dimefm.reproduce --scale smoke      a small part of it, to see that everything works
python -m dimefm.reproduce --scale paper      the paper's job, on data that --images, --texts and --val name
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from dimefm import storage
from dimefm.errors import DimefmError
from dimefm.forecast import paper_forecast
from dimefm.report import EVALUATIONS, write_report
from dimefm.sample import sample_dir

BARS = {"cifar10": 3.5, "caltech101": 8.0}
"""Times chance that a student of the sample must reach in top-1: proof that it learned."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What one scale runs on. `train` are further options of train-student; `grounded` draws its texts from those
    that some image retrieved."""

    teacher: tuple[str, ...]
    images: tuple[str, ...]
    texts: tuple[str, ...]
    val: tuple[str, ...]
    recipe: str
    train: tuple[str, ...] = ()
    grounded: bool = False
    bars: dict[str, float] = field(default_factory=dict)


def sample_scale() -> Scale:
    """The whole shipped sample."""
    root = sample_dir()
    return Scale(
        teacher=("--teacher", f"local-dir:{root / 'teacher'}"),
        images=(str(root / "images"),),
        texts=(str(root / "texts"),),
        val=(str(root / "eval" / "cifar10"), str(root / "eval" / "caltech101")),
        recipe="sample",
        bars=BARS,
    )


def smoke_scale() -> Scale:
    """A fifth of the sample's images, a fifth of its sentences, two epochs: everything runs, nothing is learned."""
    whole = sample_scale()
    texts = sample_dir() / "texts"
    return Scale(
        teacher=whole.teacher,
        images=(str(sample_dir() / "images" / "train-00000.tar"),),
        texts=(str(texts / "visual_gcc_validation.txt.gz"), str(texts / "mixed_wordnet_examples.txt.gz")),
        val=whole.val[1:],
        recipe="sample",
        train=("--epochs", "2"),
    )


def commands(scale: Scale, out: Path) -> list[tuple[str, list[str]]]:
    """The job: a name and a `dimefm` command line for each stage."""
    images, texts, prompts = (str(out / name) for name in ("images.zarr", "texts.zarr", "prompts.zarr"))
    index, pairs, grounded = (str(out / name) for name in ("texts.index", "pairs.zarr", "texts.selection"))
    run, student = str(out / "run"), str(out / "student")
    stores = ["--images", images, "--texts", texts]
    if scale.grounded:
        stores += ["--selection", grounded, "--text-mix", "selected=1"]
    training = ["--recipe", scale.recipe, *scale.train]
    validation = [word for path in scale.val for word in ("--val", path)] + ["--val-texts", prompts]
    teacher = scale.teacher[1:]  # `evaluate` takes the model's name as its argument
    evaluation = ["--predictions", "--skip-existing", "--out", str(out / EVALUATIONS)]
    return [
        ("cache-images", ["cache-images", *scale.images, "--out", images, *scale.teacher]),
        ("cache-texts", ["cache-texts", *scale.texts, "--out", texts, *scale.teacher]),
        ("cache-prompts", ["cache-texts", *scale.val, "--out", prompts, *scale.teacher]),
        ("build-index", ["build-index", texts, "--out", index, "--queries", images]),
        ("retrieve", ["retrieve", images, "--texts", texts, "--index", index, "--top-k", "16", "--out", pairs]),
        ("select-texts", ["select-texts", pairs, "--out", grounded]),
        ("train-student", ["train-student", *stores, "--out", run, *training, *validation]),
        ("export", ["export", run, "--out", student]),
        ("evaluate student", ["evaluate", student, *scale.val, *evaluation, "--name", "student"]),
        ("evaluate teacher", ["evaluate", *teacher, *scale.val, *evaluation, "--name", "teacher"]),
    ]


def run_all(stages: list[tuple[str, list[str]]], out: Path) -> None:
    """Run every stage, echoing it. stages.json keeps the seconds of each, as first run; null where it was stopped
    and went on, which no time is fair for."""
    record = str(out / "stages.json")
    seconds: dict[str, float | None] = storage.read_json(record) if storage.exists(record) else {}
    for name, words in stages:
        print(f"\n$ {shlex.join(['dimefm', *words])}", flush=True)
        first = name not in seconds
        storage.write_json(record, {**seconds, name: seconds.get(name)})
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "dimefm", *words], check=False)
        if done.returncode:
            raise DimefmError(f"{name} failed with exit code {done.returncode}", remedy="mend it and run this again")
        seconds[name] = round(time.monotonic() - began, 1) if first else seconds[name]
        storage.write_json(record, seconds)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--scale", "name", type=click.Choice(["smoke", "sample", "paper"]), default="sample", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for everything. Default: runs/SCALE.")
@click.option("--images", multiple=True, help="Scale paper: image sources.")
@click.option("--texts", multiple=True, help="Scale paper: text sources.")
@click.option("--val", multiple=True, help="Scale paper: labelled sets.")
@click.option("--teacher", default="ViT-L-14-quickgelu", show_default=True, help="Scale paper: open_clip name.")
@click.option("--pretrained", default="openai", show_default=True, help="Scale paper: its weights.")
@click.option("--dry-run", is_flag=True, help="Print the commands, and for scale paper what it would cost.")
def main(
    name: str,
    out: Path | None,
    images: tuple[str, ...],
    texts: tuple[str, ...],
    val: tuple[str, ...],
    teacher: str,
    pretrained: str,
    dry_run: bool,
) -> None:
    """Run the whole DIME-FM job. Stopped and run again, it goes on where it was."""
    out = out or Path("runs") / name
    if name == "paper":
        named = ("--teacher", teacher, "--pretrained", pretrained)
        if not dry_run and not (images and texts and val):
            raise click.UsageError("scale paper needs --images, --texts and --val (or --dry-run)")
        places = (images or ("IMAGES",), texts or ("TEXTS",), val or ("VAL",))
        scale = Scale(teacher=named, images=places[0], texts=places[1], val=places[2], recipe="paper", grounded=True)
    else:
        scale = smoke_scale() if name == "smoke" else sample_scale()
    stages = commands(scale, out)
    try:
        if dry_run:
            for _, words in stages:
                click.echo(f"$ {shlex.join(['dimefm', *words])}")
            if name == "paper":
                click.echo("\n" + paper_forecast(images, texts))
            return
        run_all(stages, out)
        report = write_report(out, scale.bars)
    except DimefmError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n" + report.text)
    if report.missed:
        raise click.ClickException(f"below the bar: {', '.join(report.missed)}")


if __name__ == "__main__":
    main(prog_name="reproduce")
