"""`dimefm recipes`."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import fields_of
from dimefm.system.inert_text import say
from dimefm.system.near_names import did_you_mean

_CONFIG = "dimefm.training.config"
_WIDTH = 80


@click.command(cls=Command)
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes of train-student.

    With a NAME: all fields that the recipe sets, with what they are. Other fields have their defaults.
    """
    from dimefm.training.recipes import RECIPES

    words = {one: inspect.getdoc(recipe) or "" for one, recipe in RECIPES.items()}
    if name is None:
        formatter = click.HelpFormatter(width=_WIDTH)
        formatter.write_dl([(one, re.split(r"(?<=\.)\s", text)[0]) for one, text in words.items()])
        say(formatter.getvalue(), nl=False)
    elif name not in RECIPES:
        near = did_you_mean(name, RECIPES, f"there are {', '.join(RECIPES)}")
        raise click.BadParameter(f"no recipe is called {name!r}: {near}", param_hint="NAME")
    else:
        say(f"{_wrapped(words[name])}\n\n{_fields(RECIPES[name]('', '', ''))}", nl=False)


def training_fields() -> dict[str, str]:
    """Every field of the training config, as --set takes it, with the line that says what it is."""
    parts = {"loss": "LossConfig", "text_mix": "TextMix"}
    fields = {name: field for name, field in fields_of(_CONFIG, "TrainConfig").items() if name not in parts}
    for part, config in parts.items():
        fields |= {f"{part}.{name}": field for name, field in fields_of(_CONFIG, config).items()}
    return {name: field.words.replace("`", "") for name, field in fields.items()}


def _wrapped(text: str) -> str:
    """A docstring in lines of 80 columns, with its paragraphs and points."""
    blocks = re.split(r"\n\n|\n(?=- )", text)
    return "\n".join(
        ("" if number == 0 or block.startswith("- ") else "\n")
        + textwrap.fill(
            " ".join(block.split()), _WIDTH, subsequent_indent="  " * block.startswith("- "), break_on_hyphens=False
        )
        for number, block in enumerate(blocks)
    )


def _fields(recipe: Any) -> str:
    """The fields that a recipe sets, with their values and the line below each."""
    from dimefm.commands.train_config import set_by, shown

    lines = training_fields()
    rows = [
        (f"{name}={shown(value)}", lines[name])
        for name, (value, by_recipe) in set_by(recipe).items()
        if by_recipe and name not in ("images", "texts", "out") and not (value == 0 and "." in name)
    ]
    formatter = click.HelpFormatter(width=_WIDTH)
    formatter.write_dl(rows)
    return formatter.getvalue()
