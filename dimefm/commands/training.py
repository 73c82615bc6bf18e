"""`dimefm train-student`, `export` and `convert-checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import click

from cache_schemas import SchemaError
from dimefm.commands.weights_options import weights_options
from dimefm.system.inert_text import say


@click.command()
@click.option("--images", required=True, help="Image store.")
@click.option("--texts", required=True, help="Text store.")
@click.option("--out", required=True, help="The run folder to write.")
@click.option("--pairs",
              help="Pseudo-text store, for --text-mix retrieved=... or selected=..., or contrastive.")  # fmt: skip
@click.option("--selection", help="Selected sentences, for --text-mix selected=... in place of those of --pairs.")
@click.option("--recipe", type=click.Choice(["paper", "sample-paper", "sample"]), default="paper", show_default=True,
              help="Where every option below that is not given comes from.")  # fmt: skip
@click.option("--student", help="Image tower: an open_clip model (ViT-B-32) or a timm model (resnet18).")
@click.option("--init", metavar="WEIGHTS",
              help="Its first weights: an open_clip tag, timm, a file, or an open_clip folder.")  # fmt: skip
@click.option("--text-student", metavar="NAME", help="Distil the text tower of this open_clip model too.")
@click.option("--image-size", type=click.IntRange(1), help="Pixels a side.")
@click.option("--epochs", type=float)
@click.option("--batch-size", type=click.IntRange(1), help="Images of a step, of all processes together.")
@click.option("--accumulate", type=click.IntRange(1), metavar="N",
              help="Passes that a step is split into, to save memory.")  # fmt: skip
@click.option("--texts-per-step", type=click.IntRange(1), help="Texts of a step; may be far more than images.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--weight-decay", type=float)
@click.option("--clip-grad", type=float, metavar="NORM", help="Largest norm of the gradient.")
@click.option("--ema", type=float, metavar="DECAY", help="Keep a moving average of the weights: 0.9998.")
@click.option("--loss", metavar="NAME=WEIGHT,...",
              help="Of vl, pvl, udist, cosine, centred, contrastive: vl=0.7,pvl=0.3.")  # fmt: skip
@click.option("--text-mix", metavar="KIND=SHARE,...", help="Of random, selected, retrieved; sum 1.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
              help="auto: bf16 on CPUs with AMX and recent GPUs; else fp32 on a CPU, fp16 on a GPU.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1),
              help="Of torch, in each process. Default: its cores, or OMP_NUM_THREADS.")  # fmt: skip
@click.option("--compile", is_flag=True, default=None, help="torch.compile the towers.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
              help="Any other field of the config: loss.vl_temperature=2. May be repeated.")  # fmt: skip
@click.option("--val", multiple=True, help="Labelled set to validate on; may be repeated.")
@click.option("--val-texts", help="Text store with the prompts of the --val sets. Default: --texts.")
@click.option("--val-every", type=float, help="Epochs between validations.")
@click.option("--checkpoint-every", type=click.IntRange(1), help="Steps between checkpoints. Default: ten minutes.")
@click.option("--keep", type=click.IntRange(1), help="How many checkpoints stay, beside the best.")
@click.option("--log-every", type=click.IntRange(1), help="Steps between lines of metrics.jsonl.")
@click.option("--max-steps", type=click.IntRange(1), help="The length of the run in steps, if --epochs is longer.")
@click.option("--workers", type=click.IntRange(0),
              help="Processes that decode images; 0: the training process. Default: by cores and memory.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--allow-changes", metavar="FIELD,...", default="",
              help="Go on with others of these than it began with: lr,epochs; images: other rows.")  # fmt: skip
def train_student(
    images: str, texts: str, out: str, recipe: str, settings: tuple[str, ...], allow_changes: str, **options: Any
) -> None:
    """Train a student from cached embeddings; no teacher runs. On several GPUs: torchrun -m dimefm train-student ...

    Stopped by Ctrl-C or SIGTERM it writes a checkpoint; killed in any way, the same command goes on from the last one.
    """
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
        return  # under torchrun, one process speaks for all
    scores = "".join(f"\n  {name:<14} top-1 {score:.3f}" for name, score in result.validation.items())
    say(f"{result.out}: {result.steps:,} steps done{scores}")


def _weights(option: str, text: str, kind: Any) -> Any:
    """`vl=0.7,pvl=0.3` as a config in which every weight that is not named is 0."""
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
    """The config with `loss.queue=4096` and the like; values as JSON, or as they are where they are no JSON."""
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
            message = f"{setting!r}: not FIELD=VALUE of a field that there is; those: {', '.join(_fields(raw))}"
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


@click.command()
@click.argument("run")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP", help="Of a run.")
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True,
              help="Of a run: the weights, or their moving average.")  # fmt: skip
@click.option("--teacher", help="Where the teacher is now. Default: where it was when images were cached.")
@click.option("--pretrained", help="Its tag or file, with a plain NAME.")
def export(run: str, **options: Any) -> None:
    """Write a run's student, with its own text tower or the teacher's, as an open_clip folder.

    Load it with open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    from dimefm.export.export_student import export as write

    say(f"{write(run, **options)}: load it with open_clip as local-dir:{options['out']}")


@click.command()
@click.argument("checkpoint")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--teacher", required=True,
              help="open_clip model with the text tower: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER.")  # fmt: skip
@weights_options
def convert_checkpoint(checkpoint: str, **options: Any) -> None:
    """Write a checkpoint of the authors of DIME-FM as an open_clip folder, with the teacher's text tower.

    CHECKPOINT: a ViT that they released, or that their training code saved; Swin students cannot be converted. Their
    teacher is --teacher ViT-L-14-quickgelu --pretrained openai. The folder is as export writes one, for evaluate and
    open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    from dimefm.models.authors_checkpoint import convert

    say(convert(checkpoint, **options).show())
