"""`dimefm evaluate`, `sets`, `compare` and `submission`: parsing, and one library call each."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from dimefm.commands.weights_options import weights_options
from dimefm.system.inert_text import say

_SUITES = ["imagenet", "robustness", "elevater", "retrieval", "all"]
_TASKS = ["zero-shot", "linear-probe", "few-shot"]


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


@click.command()
@click.argument("model")
@click.argument("folders", nargs=-1, metavar="[SET]...")
@click.option("--suite", type=click.Choice(_SUITES), help="Sets that dimefm knows (see dimefm sets), below --data.")
@click.option("--data", metavar="ROOT", help="The folder or URL that holds a folder for each set.")
@click.option("--sets", type=_Names(), default=(), metavar="A,B", help="Only these of the suite, or of --data.")
@weights_options
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP", help="Of a run.")
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True,
              help="Of a run: the weights, or their moving average.")  # fmt: skip
@click.option("--task", "tasks", type=click.Choice(_TASKS), multiple=True, default=("zero-shot",), show_default=True,
              help="May be repeated. Probes need a train split.")  # fmt: skip
@click.option("--selection", type=click.Choice(["honest", "elevater"]), default="honest", show_default=True,
              help="What chooses a probe: validation images alone; or, as ELEVATER's code, the best epoch on test "
              "images too, and the result is called test-selected.")  # fmt: skip
@click.option("--solver", type=click.Choice(["sgd", "lbfgs"]), default="sgd", show_default=True,
              help="Of a probe: ELEVATER's, or CLIP's logistic regression.")  # fmt: skip
@click.option("--shots", type=_Numbers(), default="5,20,50", show_default=True, help="Of few-shot: images a class.")
@click.option("--seeds", type=_Numbers(), default="0,1,2", show_default=True, help="Of few-shot: which ones.")
@click.option("--decoder", type=click.Choice(["pillow", "fast"]), default="pillow", show_default=True,
              help="Exactly open_clip's pixels; or within 2 of 255 of them, decoded three times as fast.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="That decode. Default: one a CPU core.")
@click.option("--out", default="evaluations", show_default=True, help="The folder of all evaluations.")
@click.option("--name", help="Of this model's folder in it. Default: the model's own.")
@click.option("--skip-existing", is_flag=True, help="Keep results of the same model, images and settings.")
@click.option("--predictions", is_flag=True, help="Keep every image's prediction and scores, with a summary.")
def evaluate(model: str, **options: Any) -> None:
    """Measure MODEL on labelled sets: zero-shot, retrieval, linear probe, few-shot.

    MODEL: a run folder, an exported open_clip folder, or an open_clip name (also hf-hub:, local-dir:).

    SET: a folder of your own with classnames.txt, templates.txt and images: tars of key.jpg and key.cls, Parquet files,
    or one folder a class; below test/ and train/, or the test images alone. Of key.jpg and key.txt, a caption a line,
    retrieval is measured.

    Images go through the model once; results are appended to OUT/NAME/results.jsonl. Stopped, the same command goes on.
    """
    from dimefm.evaluation.config import EvaluationConfig
    from dimefm.evaluation.evaluate import evaluate as run
    from dimefm.evaluation.summary import result_line, summary_text

    _require_sense(options)
    done = run(EvaluationConfig(model=model, **options), lambda result: say(result_line(result)))
    say(summary_text(done))
    if done.failed:
        raise click.exceptions.Exit(1)


def _require_sense(options: dict[str, Any]) -> None:
    """Refuses options that contradict each other, or have no effect without another."""
    if options["solver"] == "lbfgs" and options["selection"] == "elevater":
        raise click.UsageError("--selection elevater chooses among SGD's epochs, and --solver lbfgs has none")
    known = options["suite"] or options["sets"]
    if not options["folders"] and not known:
        raise click.UsageError("name a SET, or give --suite or --sets with --data ROOT")
    if bool(known) != bool(options["data"]):
        raise click.UsageError("--data ROOT goes with --suite or --sets, and they with it")
    tasks = options["tasks"]
    for names, wanted in (
        (("selection", "solver"), ("linear-probe", "few-shot")),
        (("shots", "seeds"), ("few-shot",)),
    ):
        for name in names:
            if _was_given(name) and not set(wanted) & set(tasks):
                raise click.UsageError(f"--{name} has no effect without --task {' or --task '.join(wanted)}")


def _was_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--data", metavar="ROOT", help="Also say which of them are there, and where.")
def sets(names: tuple[str, ...], data: str | None) -> None:
    """List the evaluation sets that dimefm knows; of one NAME, everything, with where to get it."""
    from dimefm.datasets.describe_sets import describe_sets
    from dimefm.datasets.known_sets import find_sets

    definitions, found = find_sets(names, data)
    say(describe_sets(definitions, found))


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="NAME...")
@click.option("--out", multiple=True, help="Also write the table; .md, .csv or .tex. May be repeated.")
@click.option("--no-published", is_flag=True, help="Without the rows that the paper published.")
def compare(folders: tuple[str, ...], out: tuple[str, ...], no_published: bool) -> None:
    """Models side by side, beside the published rows, as a Markdown table.

    NAME: a folder that evaluate wrote, such as evaluations/STUDENT.
    """
    from dimefm.evaluation.compare import compare as run
    from dimefm.evaluation.compare import write_comparison

    table = run(folders, published=not no_published)
    for path in out:
        write_comparison(table, path)
    say(table.markdown(), nl=False)


@click.command()
@click.argument("folder", metavar="NAME")
@click.option("--out", required=True, help="The .zip to write.")
@click.option("--protocol", default="zero-shot", show_default=True,
              help="Such as linear-probe/honest, or few-shot-5/honest for all its seeds.")  # fmt: skip
@click.option("--order", metavar="FOLDER", help="The toolkit's lists of test images, DATASET.txt: the order of rows.")
def submission(folder: str, **options: Any) -> None:
    """Write the file that ELEVATER's leaderboard takes, of predictions that evaluate --predictions kept."""
    from dimefm.evaluation.submission import write_submission

    found = write_submission(folder, **options)
    lines = ["; ".join([name, *partial]) for name, partial in found.items()]
    say("\n  ".join([f"{options['out']}: {len(found)} sets of 20", *lines]))
