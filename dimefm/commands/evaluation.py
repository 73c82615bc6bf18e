"""`dimefm evaluate`, `sets`, `compare` and `submission`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.embedding_store import CpuDecoder
from cache_schemas.evaluation import EvaluationTask, ProbeSelection, Solver, Suite
from cache_schemas.identity import Precision
from cache_schemas.run import Weights
from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, options_of, quiet_option, was_given
from dimefm.commands.weights_options import weights_options
from dimefm.models.names import require_model
from dimefm.system.inert_text import say

_option = options_of("dimefm.evaluation.config", "EvaluationConfig")


class _Names(click.ParamType[tuple[str, ...]]):
    """`a,b` as a tuple of names."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(name for name in value.split(",") if name)


class _Numbers(click.ParamType[tuple[int, ...]]):
    """`5,20` as a tuple of numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(int(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 5,20,50", param, ctx)


@click.command(cls=Command)
@click.argument("model")
@click.argument("folders", nargs=-1, metavar="[SET]...")
@_option("--suite", type=click.Choice([*get_args(Suite), "all"]))
@_option("--data", metavar="ROOT")
@_option("--sets", type=_Names(), metavar="A,B")
@weights_options
@_option("--checkpoint", metavar="last|best|STEP")
@_option("--weights", type=click.Choice(get_args(Weights)))
@_option("--task", "tasks", type=click.Choice(get_args(EvaluationTask)), multiple=True)
@_option("--selection", type=click.Choice(get_args(ProbeSelection)))
@_option("--solver", type=click.Choice(get_args(Solver)))
@_option("--shots", type=_Numbers(), metavar="N,...")
@_option("--seeds", type=_Numbers(), metavar="SEED,...")
@_option("--decoder", type=click.Choice(get_args(CpuDecoder)))
@_option("--precision", type=click.Choice(get_args(Precision)))
@_option("--device", type=DEVICES)
@_option("--batch-size", type=click.IntRange(1))
@_option("--threads", type=click.IntRange(1))
@_option("--out")
@_option("--name")
@_option("--skip-existing", is_flag=True)
@_option("--predictions", is_flag=True)
@quiet_option
def evaluate(model: str, **options: Any) -> None:
    """Measure MODEL on labelled sets.

    It measures zero-shot classification, retrieval, linear probes and few-shot probes.

    MODEL: a run folder, an exported open_clip folder, or an open_clip name (also hf-hub:, local-dir:).

    SET: a folder of your own with images: one folder per class, or tars of key.jpg and key.cls, or Parquet files. They
    lie below test/ and train/, or are the test images alone. classnames.txt and templates.txt have class names and
    prompts; class folders do without. From tars of key.jpg and key.txt, with one caption per line, retrieval is
    measured.

    Each image goes through the model once; results are appended to OUT/NAME/results.jsonl. If it is stopped, run the
    same command again: it goes on.
    """
    _require_sense(options)
    if not Path(model).exists():
        require_model(model, options["pretrained"], folder="")
    from dimefm.evaluation.config import EvaluationConfig
    from dimefm.evaluation.evaluate import evaluate as run
    from dimefm.evaluation.summary import result_line, summary_text

    done = run(EvaluationConfig(model=model, **options), lambda result: say(result_line(result)))
    say(summary_text(done))
    if done.failed:
        raise click.exceptions.Exit(1)


def _require_sense(options: dict[str, Any]) -> None:
    """Raises UsageError for options that contradict each other, or have no effect without another."""
    if options["solver"] == "lbfgs" and options["selection"] == "elevater":
        raise click.UsageError("--selection elevater chooses one of SGD's epochs, and --solver lbfgs has none")
    known = options["suite"] or options["sets"]
    if not options["folders"] and not known:
        raise click.UsageError("name a SET, or give --suite or --sets with --data ROOT")
    if bool(known) != bool(options["data"]):
        raise click.UsageError("--data ROOT goes with --suite or --sets, and they go with it")
    tasks = options["tasks"]
    for names, wanted in (
        (("selection", "solver"), ("linear-probe", "few-shot")),
        (("shots", "seeds"), ("few-shot",)),
    ):
        for name in names:
            if was_given(name) and not set(wanted) & set(tasks):
                raise click.UsageError(f"--{name} has no effect without --task {' or --task '.join(wanted)}")


@click.command(cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--data", metavar="ROOT", help="Also say which of them are found below this folder or URL, and where.")
def sets(names: tuple[str, ...], data: str | None) -> None:
    """List the labelled sets that dimefm knows.

    With a single NAME: all that is known about the set, and where to get it.
    """
    from dimefm.datasets.describe_sets import describe_sets
    from dimefm.datasets.known_sets import find_sets

    definitions, found = find_sets(names, data)
    say(describe_sets(definitions, found))


@click.command(cls=Command)
@click.argument("folders", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--out", multiple=True, metavar="FILE", help="Also write the table to a .md, .csv or .tex file. May be repeated."
)
@click.option("--no-published", is_flag=True, help="Leave out the results that the paper published.")
def compare(folders: tuple[str, ...], out: tuple[str, ...], no_published: bool) -> None:
    """Print models side by side, with published results.

    The table is in Markdown.

    NAME: a folder that evaluate wrote, such as evaluations/STUDENT.
    """
    from dimefm.evaluation.compare import compare as run
    from dimefm.evaluation.compare import write_comparison

    table = run(folders, published=not no_published)
    for path in out:
        write_comparison(table, path)
    say(table.markdown(), nl=False)


@click.command(cls=Command)
@click.argument("folder", metavar="NAME")
@click.option("--out", required=True, help="The .zip file to write.")
@click.option("--protocol", default="zero-shot", show_default=True,
              help="Which results: also linear-probe/honest, or few-shot-5/honest for all its seeds.")  # fmt: skip
@click.option(
    "--order",
    metavar="FOLDER",
    help="Folder of the toolkit's lists of test images, DATASET.txt, which give the order of rows.",
)
def submission(folder: str, **options: Any) -> None:
    """Write the file that ELEVATER's leaderboard takes.

    NAME: a folder that evaluate --predictions wrote, such as evaluations/STUDENT.
    """
    from dimefm.evaluation.submission import write_submission

    found = write_submission(folder, **options)
    lines = ["; ".join([name, *partial]) for name, partial in found.items()]
    say("\n  ".join([f"{options['out']}: {len(found)} sets of 20", *lines]))
