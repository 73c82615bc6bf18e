"""`dimefm predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.run import Weights
from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, json_option, options_of, quiet_option, require_run, say_json
from dimefm.commands.weights_options import weights_options
from dimefm.errors import SourceError, TeacherError
from dimefm.models.names import require_any_model
from dimefm.system.inert_text import line, say
from dimefm.system.notes import note
from dimefm.system.wording import counted

_option = options_of("dimefm.prediction.config", "PredictConfig")


class _Classes(click.ParamType[tuple[str, ...]]):
    """`cat,dog` as a tuple of names."""

    name = "classes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else tuple(value.split(","))


@click.command(cls=Command)
@click.argument("model")
@click.argument("images", nargs=-1, metavar="IMAGE...")
@_option("--classes", type=_Classes(), metavar="A,B,...")
@_option("--classes-from", metavar="FILE")
@_option("--templates", metavar="FILE")
@_option("--top-k", type=click.IntRange(1))
@_option("--images-from", metavar="FILE")
@weights_options
@_option("--checkpoint", metavar="last|best|STEP")
@_option("--weights", type=click.Choice(get_args(Weights)))
@_option("--device", type=DEVICES)
@json_option
@quiet_option
def predict(as_json: bool, **options: Any) -> None:
    """Say which of some classes an image shows, and how likely.

    MODEL: a run folder, an exported folder of any format, or an open_clip name (also hf-hub:, local-dir:). A student in
    the format onnx needs neither torch nor open_clip, and answers within seconds.

    IMAGE: image files, folders of them, tars and tables, also as globs and URLs. A dash stands for an image on standard
    input.

    Images that cannot be read are named, and the others go on; it exits with 1 if none could be read.
    """
    options["classes"] = options["classes"] or ()
    _require_sense(**options)
    _require_model(options["model"], options["pretrained"])
    from dimefm.prediction.config import PredictConfig
    from dimefm.prediction.predict import Prediction, Unreadable, open_predictor
    from dimefm.prediction.show import document, show

    config = PredictConfig(**options)
    found: list[Prediction | Unreadable] = []
    unread: list[Unreadable] = []
    with open_predictor(config) as predictor:
        if predictor.by_itself:
            note("each class has a probability of its own: the model was trained with a sigmoid")
        for one in predictor.run():
            if isinstance(one, Unreadable):
                unread.append(one)
                say(f"{line(one.image)}: {line(one.reason)}", err=True)
            elif not as_json:
                say(show(one, predictor))
            found += [one] if as_json else []
    if as_json:
        say_json(document(found, predictor))
    _count(len(unread), len(predictor.pictures))


def _count(unread: int, total: int) -> None:
    """What could not be read. Raises SourceError where that is all."""
    if unread == total:
        what = "the image could not be read" if total == 1 else f"none of the {total:,} images could be read"
        raise SourceError(what, remedy="the reason stands above; dimefm predict --help says what an IMAGE may be")
    if unread:
        say(f"{unread:,} of {counted(total, 'image')} could not be read", err=True)


def _require_sense(**options: Any) -> None:
    """Raises UsageError for what is missing, or contradicts itself."""
    images, classes, listed = options["images"], options["classes"], options["images_from"]
    if not images and not listed:
        raise click.UsageError("name an IMAGE, or give --images-from FILE")
    if bool(classes) == bool(options["classes_from"]):
        raise click.UsageError("give either --classes A,B,... or --classes-from FILE")
    dashes = [*images, listed].count("-")
    if dashes > 1:
        raise click.UsageError("- is given more than once, and there is one standard input")
    if dashes and sys.stdin.isatty():
        raise click.UsageError("- stands for standard input, and nothing is piped into it")
    require_run(options["model"], "checkpoint", "weights")


def _require_model(model: str, pretrained: str | None) -> None:
    """Raises TeacherError unless `model` is a run, an exported folder, or a name that open_clip knows."""
    if Path(model).is_file():
        raise TeacherError(f"{model} is a file, and the model comes first", remedy="dimefm predict MODEL IMAGE...")
    require_any_model(model, pretrained)
