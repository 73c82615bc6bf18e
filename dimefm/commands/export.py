"""`dimefm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.export import ExportFormat, ImageInput
from cache_schemas.run import Weights
from dimefm.commands.help import Command, heading
from dimefm.commands.options import options_of, quiet_option, require_run
from dimefm.models.names import require_model
from dimefm.system.inert_text import say

_option = options_of("dimefm.export.config", "ExportConfig")


@click.command(cls=Command)
@click.argument("run")
@_option("--out", required=True)
@_option("--format", type=click.Choice(get_args(ExportFormat)))
@_option("--checkpoint", metavar="last|best|STEP")
@_option("--weights", type=click.Choice(get_args(Weights)))
@_option("--teacher")
@_option("--pretrained")
@quiet_option
@heading("Size and speed")
@_option("--precision", type=click.Choice(["fp32", "fp16"]))
@_option("--int8", is_flag=True)
@_option("--max-loss", type=click.FloatRange(0), metavar="POINTS")
@_option("--accept", is_flag=True)
@_option("--image-input", type=click.Choice(get_args(ImageInput)))
@_option("--check-on", multiple=True, metavar="SET")
@heading("Model card")
@_option("--evaluation", multiple=True, metavar="EVALUATION")
@_option("--license", metavar="ID")
@_option("--data-license", metavar="TEXT")
def export(run: str, **options: Any) -> None:
    """Write the student of a run as a folder that others can load.

    RUN: a run folder, or an open_clip folder. The student has its own text tower, or else the teacher's.
    """
    if Path(run).exists():  # else the name is the mistake
        require_run(run, "checkpoint", "weights", "teacher", "pretrained")
    if options["teacher"] and not (options["teacher"].isdecimal() or options["teacher"] == "all"):
        require_model(options["teacher"], options["pretrained"])
    from dimefm.export.describe_export import describe_export
    from dimefm.export.export_student import export as write

    for line in describe_export(write(run, **options), options["out"]):
        say(line)
