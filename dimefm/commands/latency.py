"""`dimefm latency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.identity import Precision
from cache_schemas.run import RUN_FILE
from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, Numbers, json_option, options_of, quiet_option, say_json, was_given
from dimefm.models.exported import format_of
from dimefm.models.names import FOLDER
from dimefm.system.inert_text import say

_option = options_of("dimefm.latency.config", "LatencyConfig")


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_option("--batch", type=Numbers(), metavar="N,...", show_default="1,8,64")
@_option("--threads", type=Numbers(), metavar="N,...")
@_option("--device", type=DEVICES)
@_option("--precision", type=click.Choice(get_args(Precision)))
@_option("--compiled", is_flag=True)
@_option("--with-teacher", is_flag=True)
@_option("--seconds", type=float)
@_option("--out", metavar="FILE")
@json_option
@quiet_option
def latency(as_json: bool, **options: Any) -> None:
    """Measure how fast models are, side by side.

    For the image tower and the text tower of each: milliseconds per image or sentence, median and 95th percentile, and
    how many per second; also parameters, floating-point operations, size and memory. Every model runs in a process of
    its own, and they are measured in turns. dimefm compare --latency puts the figures beside accuracy.

    MODEL: a run folder, an exported folder of any format, or an open_clip name with the tag or the file of its weights
    as NAME:TAG (also hf-hub:, local-dir:). ONNX folders are run by onnxruntime, all others by PyTorch.
    """
    _require_use(options["models"])
    from dimefm.latency.config import LatencyConfig
    from dimefm.latency.measure import measure
    from dimefm.latency.table import as_document, shown

    done = measure(LatencyConfig(**options))
    if as_json:
        say_json(as_document(done))
    else:
        say(shown(done))
    if done.failed:
        raise click.exceptions.Exit(1)


def _require_use(models: tuple[str, ...]) -> None:
    """Raises UsageError for options that concern none of the models."""
    if all(format_of(model.removeprefix(FOLDER)) == "onnx" for model in models):
        for name in filter(was_given, ("precision", "compiled")):
            raise click.UsageError(f"--{name} has no effect: ONNX models have their own graphs")
        if was_given("device") and click.get_current_context().params["device"] != "cpu":
            raise click.UsageError("--device has no effect: ONNX models run on the CPU")
    if was_given("with_teacher") and not any(Path(model, RUN_FILE).exists() for model in models):
        raise click.UsageError("--with-teacher has no effect: none of the models is a run")
