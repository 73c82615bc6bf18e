"""`dimefm train-student` and `convert-checkpoint`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, get_args

import click

from cache_schemas.identity import Precision
from cache_schemas.views import Augment
from dimefm.commands.help import Command, heading
from dimefm.commands.options import (
    DEVICES,
    Bytes,
    Weights,
    json_option,
    options_of,
    quiet_option,
    require_with,
    say_json,
)
from dimefm.commands.recipes import training_fields
from dimefm.commands.weights_options import weights_options
from dimefm.models.names import require_model, require_student
from dimefm.system.inert_text import say
from dimefm.system.near_names import did_you_mean
from dimefm.system.notes import note
from dimefm.system.wording import counted, hanging

if TYPE_CHECKING:
    from dimefm.commands.train_config import Given


class _Recipes(click.Choice[str]):
    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        near = did_you_mean(str(value), self.choices, f"there are {', '.join(self.choices)}")
        return f"no recipe is called {value!r}: {near}"


_CONFIG = "dimefm.training.config"
_option = options_of(_CONFIG, "TrainConfig", defaults=False)  # they are the recipe's


def _list_fields(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print every field of the training config, as --set takes it, with the line that says what it is."""
    if not value or ctx.resilient_parsing:
        return
    formatter = click.HelpFormatter(width=ctx.terminal_width, max_width=ctx.max_content_width)
    formatter.write_dl([*training_fields().items()])
    say(formatter.getvalue(), nl=False)
    ctx.exit()


@click.command(cls=Command)
@_option("--images", multiple=True, metavar="IMAGES.zarr")
@_option("--texts", multiple=True, metavar="TEXTS.zarr")
@_option("--out", metavar="RUN")
@_option("--image-weights", type=Weights(), metavar="1::2")
@_option("--pairs")
@_option("--captions", metavar="CAPTIONS.zarr")
@_option("--selection")
@_option("--image-selection", metavar="IMAGES.selection")
@click.option("--recipe", type=_Recipes(["paper", "best", "best-vit", "sample-paper", "sample"]), default="paper",
              show_default=True,
              help="Recipe that decides every option below that is not given; dimefm recipes explains them. paper: the "
                   "authors' settings; best: those that won the comparison of docs/recipes.md, with a small student; "
                   "best-vit: the same for vision transformers; sample-paper, sample: smaller ones for the shipped "
                   "sample.")  # fmt: skip
@click.option("--config", "config_file", metavar="FILE",
              help="YAML or JSON file with fields of the config, or a run.json. It wins over --recipe, and options "
                   "given beside it win over it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would be done: every field of the config with where its "
              "value comes from, rows, steps, seconds per step, memory. Nothing is written.")  # fmt: skip
@json_option
@quiet_option
@heading("Student")
@_option("--student")
@_option("--init", metavar="WEIGHTS")
@_option("--text-student", metavar="NAME")
@_option("--image-size", type=click.IntRange(1), metavar="PIXELS")
@_option("--augment", type=click.Choice(get_args(Augment)))
@heading("Steps")
@_option("--epochs", type=float)
@_option("--max-steps", type=click.IntRange(1))
@_option("--batch-size", type=click.IntRange(1))
@_option("--accumulate", type=click.IntRange(1), metavar="N")
@_option("--texts-per-step", type=click.IntRange(1))
@_option("--lr", type=float)
@_option("--weight-decay", type=float)
@_option("--optimizer", metavar="NAME")
@_option("--clip-grad", type=float, metavar="NORM")
@_option("--ema", type=float, metavar="DECAY")
@_option("--patch-dropout", type=float, metavar="SHARE")
@_option("--gradient-checkpointing", is_flag=True, default=None)
@heading("Losses and sentences")
@_option("--loss", metavar="NAME=WEIGHT,...")
@_option("--text-mix", metavar="KIND=SHARE,...")
@heading("Machine")
@_option("--precision", type=click.Choice(["auto", *get_args(Precision)]))
@_option("--workers", type=click.IntRange(0))
@_option("--device", type=DEVICES)
@_option("--cache-dir", metavar="FOLDER")
@_option("--cache-size", type=Bytes(), metavar="SIZE")
@_option("--seed", type=click.IntRange(0))
@_option("--threads", type=click.IntRange(1))
@_option("--compile", is_flag=True, default=None)
@heading("Other fields, and changes of a run")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
              help="Set any other field of the config, such as loss.vl_temperature=2; --fields lists them. May be "
              "repeated.")  # fmt: skip
@click.option("--fields", is_flag=True, is_eager=True, expose_value=False, callback=_list_fields,
              help="List every field of the config with what it is, and exit.")  # fmt: skip
@click.option("--allow-changes", metavar="FIELD,...", default="",
              help="Go on with a run although these fields, such as lr,epochs, have other values than it began with; "
              "images: the image store has other rows.")  # fmt: skip
@heading("Validation, checkpoints, log")
@_option("--val", multiple=True)
@_option("--val-texts")
@_option("--val-every", type=float)
@_option("--checkpoint-every", type=click.IntRange(1))
@_option("--keep", type=click.IntRange(1))
@_option("--log-every", type=click.IntRange(1))
@_option("--log-to", type=click.Choice(["trackio", "wandb"]))
def train_student(
    recipe: str, config_file: str | None, settings: tuple[str, ...], allow_changes: str, dry_run: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train a student from cached embeddings.

    --images, --out and, for losses of sentences, --texts are needed, as options or in a --config file.

    No teacher runs. Ctrl-C or SIGTERM makes it write a checkpoint and stop; however it ended, the same command goes on
    from the last checkpoint. On several GPUs: torchrun -m dimefm train-student ...
    """
    from dimefm.commands.dry_run import field_lines
    from dimefm.commands.train_config import config_of
    from dimefm.training.before_training import require_changeable, require_startable

    require_with("--json", as_json or None, "--dry-run", dry_run or None)
    options = {name: value for name, value in options.items() if value not in (None, ())}
    for name in {"images", "texts"} & options.keys():
        options[name], *options[f"more_{name}"] = options[name]
    given = config_of(recipe, config_file, options, settings)
    config, changes = given.config, tuple(name.strip() for name in allow_changes.split(",") if name.strip())
    unused = {"texts_per_step", "text_mix"} & options.keys()
    if unused and not config.loss.vl:
        option = f"--{min(unused).replace('_', '-')}"
        raise click.UsageError(f"{option} has no effect: the vl loss has weight 0. Give --loss vl=..., or leave it out")
    require_changeable(changes)
    require_startable(config)
    require_student(config.student, config.text_student)
    if dry_run and not as_json:
        say("\n".join([f"{config.out}: nothing is written", *field_lines(given), ""]))
    from dimefm.datasets.own_sets import require_folder
    from dimefm.training.feed_plan import plan_feed
    from dimefm.training.run_folder import require_run_folder

    rows = plan_feed(config, int(os.environ.get("WORLD_SIZE", "1"))).inputs.images.schema.rows
    require_run_folder(config.out)
    for folder in config.val:
        require_folder(folder)
    if dry_run:
        _dry_run(given, changes, as_json)
        return
    if not int(os.environ.get("RANK", "0")):
        note(f"{counted(rows, 'image')}: loading torch and the student ...")
    from dimefm.training.train import train

    result = train(config, changes)
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process alone prints
    scores = "".join(f"\n  {name:<14} top-1 {score:.3f}" for name, score in result.validation.items())
    say(f"{result.out}: {counted(result.steps, 'step')} done{scores}")


def _dry_run(given: Given, changes: tuple[str, ...], as_json: bool) -> None:
    from dimefm.commands.dry_run import foresight_lines, origins

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("--dry-run looks at one process: run it without torchrun")
    note("loading torch, then measuring a few steps on random data ...")
    from dimefm.training.dry_run import foresee

    found = foresee(given.config, changes)
    for line in found.notes:
        note(hanging("note: ", line))
    if as_json:
        by = origins(given)
        fields = {name: {"value": value, "from": by[name]} for name, value in given.values.items()}
        say_json({"fields": fields, **found.to_json()})
    else:
        say("\n".join(foresight_lines(found)))


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
    from dimefm.models.trained import checkpoint_file

    checkpoint_file(checkpoint)
    require_model(options["teacher"], options["pretrained"])
    note(f"{checkpoint}: loading the teacher, for its text tower ...")
    from dimefm.models.authors_checkpoint import convert  # imports torch and open_clip

    say(convert(checkpoint, **options).show())
