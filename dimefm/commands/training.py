"""`dimefm train-student`, `export` and `convert-checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, get_args

import click

from cache_schemas import SchemaError
from cache_schemas.identity import Precision
from cache_schemas.run import Weights
from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, fields_of, options_of, quiet_option
from dimefm.commands.weights_options import weights_options
from dimefm.models.names import require_model, require_student
from dimefm.system.inert_text import say

_CONFIG = "dimefm.training.config"
_option = options_of(_CONFIG, "TrainConfig", defaults=False)  # they are the recipe's
_run_option = options_of("dimefm.evaluation.config", "EvaluationConfig")


def _list_fields(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print every field of the training config, as --set takes it, with the line that says what it is."""
    if not value or ctx.resilient_parsing:
        return
    formatter = click.HelpFormatter(width=ctx.terminal_width, max_width=ctx.max_content_width)
    parts = {"loss": "LossConfig", "text_mix": "TextMix"}
    rows = [(name, field.words) for name, field in fields_of(_CONFIG, "TrainConfig").items() if name not in parts]
    for part, config in parts.items():
        rows += [(f"{part}.{name}", field.words) for name, field in fields_of(_CONFIG, config).items()]
    formatter.write_dl([(name, words.replace("`", "")) for name, words in rows])
    say(formatter.getvalue(), nl=False)
    ctx.exit()


@click.command(cls=Command)
@_option("--images", required=True)
@_option("--texts", required=True)
@_option("--out", required=True)
@_option("--pairs")
@_option("--selection")
@click.option("--recipe", type=click.Choice(["paper", "sample-paper", "sample"]), default="paper", show_default=True,
              help="Recipe that decides every option below that is not given. paper: the authors' settings; "
                   "sample-paper, sample: small students for the shipped sample.")  # fmt: skip
@_option("--student")
@_option("--init", metavar="WEIGHTS")
@_option("--text-student", metavar="NAME")
@_option("--image-size", type=click.IntRange(1), metavar="PIXELS")
@_option("--epochs", type=float)
@_option("--batch-size", type=click.IntRange(1))
@_option("--accumulate", type=click.IntRange(1), metavar="N")
@_option("--texts-per-step", type=click.IntRange(1))
@_option("--lr", type=float)
@_option("--weight-decay", type=float)
@_option("--clip-grad", type=float, metavar="NORM")
@_option("--ema", type=float, metavar="DECAY")
@_option("--loss", metavar="NAME=WEIGHT,...")
@_option("--text-mix", metavar="KIND=SHARE,...")
@_option("--precision", type=click.Choice(["auto", *get_args(Precision)]))
@_option("--threads", type=click.IntRange(1))
@_option("--compile", is_flag=True, default=None)
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
              help="Set any other field of the config, such as loss.vl_temperature=2; --fields lists them. May be "
              "repeated.")  # fmt: skip
@click.option("--fields", is_flag=True, is_eager=True, expose_value=False, callback=_list_fields,
              help="List every field of the config with what it is, and exit.")  # fmt: skip
@_option("--val", multiple=True)
@_option("--val-texts")
@_option("--val-every", type=float)
@_option("--checkpoint-every", type=click.IntRange(1))
@_option("--keep", type=click.IntRange(1))
@_option("--log-every", type=click.IntRange(1))
@_option("--max-steps", type=click.IntRange(1))
@_option("--workers", type=click.IntRange(0))
@_option("--seed", type=click.IntRange(0))
@_option("--device", type=DEVICES)
@click.option("--allow-changes", metavar="FIELD,...", default="",
              help="Go on with a run although these fields, such as lr,epochs, have other values than it began with; "
              "images: the image store has other rows.")  # fmt: skip
@quiet_option
def train_student(
    images: str, texts: str, out: str, recipe: str, settings: tuple[str, ...], allow_changes: str, **options: Any
) -> None:
    """Train a student from cached embeddings.

    No teacher runs. Ctrl-C or SIGTERM makes it write a checkpoint and stop; however it ended, the same command goes on
    from the last checkpoint. On several GPUs: torchrun -m dimefm train-student ...
    """
    require_student(options["student"], options["text_student"])
    from dimefm.training.config import LossConfig, TextMix
    from dimefm.training.recipes import RECIPES
    from dimefm.training.train import train

    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name, kind in (("loss", LossConfig), ("text_mix", TextMix)):
        if name in given:
            given[name] = _weights(f"--{name.replace('_', '-')}", given[name], kind)
    config = _set(dataclasses.replace(RECIPES[recipe](images, texts, out), **given), settings)
    unused = {"texts_per_step", "text_mix"} & given.keys()
    if unused and not config.loss.vl:
        option = f"--{min(unused).replace('_', '-')}"
        raise click.UsageError(f"{option} has no effect: the vl loss has weight 0. Give --loss vl=..., or leave it out")
    result = train(config, tuple(name.strip() for name in allow_changes.split(",") if name.strip()))
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process alone prints
    scores = "".join(f"\n  {name:<14} top-1 {score:.3f}" for name, score in result.validation.items())
    say(f"{result.out}: {result.steps:,} steps done{scores}")


def _weights(option: str, text: str, kind: Any) -> Any:
    """A config of `vl=0.7,pvl=0.3`: weights that are not named are 0."""
    values = dict.fromkeys(kind.WEIGHTS, 0.0)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in values:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(values)}", param_hint=option)
        try:
            values[name] = float(value)
        except ValueError:
            raise click.BadParameter(f"{part!r} is not NAME=NUMBER", param_hint=option) from None
    return kind(**values)


def _set(config: Any, settings: tuple[str, ...]) -> Any:
    """The config with settings such as `loss.queue=4096`. A value is read as JSON, or as a string if it is none."""
    if not settings:
        return config
    raw = config.to_json()
    for setting in settings:
        field, equals, text = setting.partition("=")
        *path, name = field.split(".")
        place = raw
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or name not in place:
            message = f"{setting!r} is not FIELD=VALUE with a field of the config (--fields explains them): "
            message += ", ".join(_fields(raw))
            raise click.BadParameter(message, param_hint="--set")
        try:
            place[name] = json.loads(text)
        except ValueError:
            place[name] = text
    try:
        return config.parse(raw, "--set")
    except SchemaError as error:
        raise click.BadParameter(str(error), param_hint="--set") from None


def _fields(raw: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in raw.items():
        found += _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


@click.command(cls=Command)
@click.argument("run")
@click.option("--out", required=True, help="Folder to write.")
@_run_option("--checkpoint", metavar="last|best|STEP")
@_run_option("--weights", type=click.Choice(get_args(Weights)))
@click.option("--teacher", help="Where the teacher is now. Default: where it was when the images were cached.")
@options_of("dimefm.inspection.verify", "VerifyConfig")("--pretrained")
@quiet_option
def export(run: str, **options: Any) -> None:
    """Write the student of a run as an open_clip folder.

    It has its own text tower, or else the teacher's. Load it with
    open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    if options["teacher"]:
        require_model(options["teacher"], options["pretrained"])
    from dimefm.export.export_student import export as write

    say(f"{write(run, **options)}: load it with open_clip as local-dir:{options['out']}")


@click.command(cls=Command)
@click.argument("checkpoint")
@click.option("--out", required=True, help="Folder to write.")
@click.option("--teacher", required=True,
              help="Teacher that has the text tower, an open_clip model: NAME, hf-hub:ORG/MODEL or "
              "local-dir:FOLDER.")  # fmt: skip
@weights_options
@quiet_option
def convert_checkpoint(checkpoint: str, **options: Any) -> None:
    """Convert a checkpoint of DIME-FM's authors.

    CHECKPOINT: a ViT that they released, or that their training code saved; Swin students cannot be converted. Their
    teacher is --teacher ViT-L-14-quickgelu --pretrained openai.

    The result is an open_clip folder as export writes it, with the teacher's text tower. Load it with evaluate or with
    open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    require_model(options["teacher"], options["pretrained"])
    from dimefm.models.authors_checkpoint import convert

    say(convert(checkpoint, **options).show())
