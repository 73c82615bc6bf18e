"""`dimefm evaluate`, `sets`, `compare` and `submission`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.embedding_store import CpuDecoder
from cache_schemas.evaluation import EvaluationTask, ProbeSelection, Solver, Suite
from cache_schemas.identity import Precision
from cache_schemas.run import Weights
from dimefm.commands.config_file import read_config
from dimefm.commands.help import Command
from dimefm.commands.options import (
    DEVICES,
    Names,
    Numbers,
    fields_of,
    json_option,
    options_of,
    quiet_option,
    require_run,
    require_with,
    say_json,
    was_given,
)
from dimefm.commands.weights_options import weights_options
from dimefm.models.exported import format_of
from dimefm.models.names import FOLDER, require_any_model
from dimefm.system.inert_text import say
from dimefm.system.near_names import did_you_mean
from dimefm.system.wording import counted

_CONFIG, _TRAINED = ("dimefm.evaluation.config", "EvaluationConfig"), ("dimefm.models.trained", "Trained")
_option = options_of(*_CONFIG)


class _Suite(click.Choice[str]):
    """A suite, or what a mistyped one was meant to be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices and (near := did_you_mean(str(value), self.choices)):
            self.fail(f"no suite is called {value!r}: {near}", param, ctx)
        return super().convert(value, param, ctx)


def _lay_below(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make the fields of a config file the defaults of all arguments and options."""
    if path is None:
        return
    parts = [f"trained.{name}" for name in fields_of(*_TRAINED)]
    fields = read_config(path, [*fields_of(*_CONFIG), *parts], "dimefm evaluate --help")
    trained = fields.pop("trained", None) or {}
    if not isinstance(trained, dict):
        raise click.BadParameter(f"{path}: trained must hold fields, such as `mean: [0.5, 0.5, 0.5]`", ctx, param)
    fields = {name.removeprefix("trained."): value for name, value in (fields | trained).items() if value is not None}
    several = [one.name for one in ctx.command.params if one.multiple or one.nargs == -1]
    ctx.default_map = {n: [v] if n in several and isinstance(v, str) else v for n, v in fields.items()}


class _Evaluate(Command):
    """Takes --selection, too, as --probe-selection was called before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [re.sub(r"^--selection(?=$|=)", "--probe-selection", one) for one in args])


@click.command(cls=_Evaluate)
@click.argument("model")
@click.argument("folders", nargs=-1, metavar="[SET]...")
@click.option("--config", metavar="FILE", is_eager=True, expose_value=False, callback=_lay_below,
              help="YAML or JSON file with fields of EvaluationConfig, such as tasks and shots; what is given on the "
                   "command line goes before it.")  # fmt: skip
@_option("--suite", type=_Suite([*get_args(Suite), "all"]))
@_option("--data", metavar="ROOT")
@_option("--sets", type=Names(), metavar="A,B")
@weights_options
@_option("--checkpoint", metavar="last|best|STEP")
@_option("--weights", type=click.Choice(get_args(Weights)))
@_option("--teacher", metavar="N|all")
@_option("--task", "tasks", type=click.Choice(get_args(EvaluationTask)), multiple=True)
@_option("--probe-selection", "selection", type=click.Choice(get_args(ProbeSelection)))
@_option("--solver", type=click.Choice(get_args(Solver)))
@_option("--shots", type=Numbers(), metavar="N,...")
@_option("--seeds", type=Numbers(), metavar="SEED,...")
@_option("--decoder", type=click.Choice(get_args(CpuDecoder)))
@_option("--precision", type=click.Choice(get_args(Precision)))
@_option("--device", type=DEVICES)
@_option("--batch-size", type=click.IntRange(1))
@_option("--threads", type=click.IntRange(1))
@_option("--out")
@_option("--name")
@_option("--skip-existing", is_flag=True)
@_option("--predictions", is_flag=True)
@_option("--leaks", metavar="LEAKS.selection")
@json_option
@quiet_option
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL on labelled sets.

    It measures zero-shot classification, retrieval, linear probes and few-shot probes.

    MODEL: a run folder, an exported folder of any format, or an open_clip name (also hf-hub:, local-dir:).

    SET: a folder of your own with images: one folder per class, or tars of key.jpg and key.cls, or Parquet files. They
    lie below test/ and train/, or are the test images alone. classnames.txt and templates.txt have class names and
    prompts; class folders do without. From tars of key.jpg and key.txt, with one caption per line, retrieval is
    measured.

    Each image goes through the model once; results are appended to OUT/NAME/results.jsonl. If it is stopped, run the
    same command again: it goes on.
    """
    from dimefm.evaluation.config import EvaluationConfig, choose_sets

    options["folders"] = options["folders"] or tuple((click.get_current_context().default_map or {}).get("folders", ()))
    _require_sense(options)
    if Path(model).exists():  # else the name is the mistake
        require_run(model, "checkpoint", "weights", "teacher")
    if was_given("precision") and format_of(model.removeprefix(FOLDER)) == "onnx":
        raise click.UsageError(f"--precision has no effect on {model}, an ONNX model: its graphs have their own")
    config = EvaluationConfig(model=model, **options)
    choose_sets(config)  # refuses what does not exist before torch is imported and the model is loaded
    require_any_model(model, config.pretrained)
    from dimefm.evaluation.evaluate import evaluate as run
    from dimefm.evaluation.summary import as_document, result_text, summary_text

    show = (lambda result: None) if as_json else (lambda result: say(result_text(result)))
    done = run(config, show)
    if as_json:
        say_json(as_document(done))
    else:
        say(summary_text(done))
    if done.failed:
        raise click.exceptions.Exit(1)


def _require_sense(options: dict[str, Any]) -> None:
    """Raises UsageError for options that contradict each other, or have no effect without another."""
    if options["solver"] == "lbfgs" and options["selection"] == "elevater":
        raise click.UsageError("--probe-selection elevater chooses one of SGD's epochs, and --solver lbfgs has none")
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
                option = "--probe-selection" if name == "selection" else f"--{name}"
                raise click.UsageError(f"{option} has no effect without --task {' or --task '.join(wanted)}")


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
@click.option("--latency", metavar="FILE", help="Add parameters, size and speed, from a file of dimefm latency.")
@click.option("--plot", metavar="FILE.png", help="Also draw accuracy against --latency.")
@json_option
def compare(
    folders: tuple[str, ...],
    out: tuple[str, ...],
    no_published: bool,
    latency: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Print models side by side.

    Beside them stands what was published on the same sets. The tables are in Markdown, one per protocol, as wide as the
    terminal allows; the table in a file is one.

    NAME: a folder that evaluate wrote, such as evaluations/STUDENT.
    """
    from dimefm.evaluation.compare import compare as run
    from dimefm.evaluation.compare import write_comparison
    from dimefm.evaluation.speed import points
    from dimefm.latency.record import read_latency
    from dimefm.system import storage

    require_with("--plot", plot, "--latency", latency)
    if plot is not None and not plot.endswith(".png"):
        raise click.UsageError(f"--plot draws a PNG, and {plot} does not end in .png")
    speeds = read_latency(latency) if latency else None
    table = run(folders, published=not no_published, latency=speeds)
    for path in out:
        write_comparison(table, path)
    if plot is not None and speeds is not None:
        found = points(table, speeds)
        from dimefm.latency.plot import write_plot  # imports matplotlib

        write_plot(storage.local(plot, "a plot"), found)
    if as_json:
        say_json(table.plain())
    else:
        say(table.shown(shutil.get_terminal_size().columns), nl=False)


@click.command(cls=Command)
@click.argument("folder", metavar="NAME")
@click.option("--out", required=True, help="The .zip file to write.")
@click.option("--protocol", default="zero-shot", show_default=True,
              help="Which results: also linear-probe/honest, or few-shot-5/honest for all its seeds; honest means "
                   "that validation images alone chose the settings of the probe.")  # fmt: skip
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
    say("\n  ".join([f"{options['out']}: {counted(len(found), 'set')} of 20", *lines]))
