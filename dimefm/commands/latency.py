"""`dimefm latency`."""

from __future__ import annotations

from typing import Any, get_args

import click

from cache_schemas.identity import Precision
from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, Numbers, json_option, options_of, quiet_option, say_json
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
