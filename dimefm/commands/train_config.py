"""The config of `dimefm train-student`: options over a file over a recipe, and where each value comes from.

A field of a part is called by its whole name, `loss.vl`, as --set calls it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from typing import Any

import click

from cache_schemas import SchemaError, to_plain
from dimefm.commands.config_file import read_config
from dimefm.system.near_names import did_you_mean
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.recipes import RECIPES

FIELDS = "dimefm train-student --fields"
WEIGHTS = {"loss": LossConfig.WEIGHTS, "text_loss": LossConfig.WEIGHTS, "text_mix": TextMix.WEIGHTS}
"""The fields of each part that are weights: where one of them is given, all others are 0."""
_OF_TEXTS = ("text_student", *(f"loss.{name}" for name in LossConfig.OF_TEXTS))
"""The fields that, with a value, need a text store."""


@dataclass(frozen=True)
class Given:
    """A config, with the value and the origin of each field: "default", "recipe NAME", the file, or an option."""

    config: TrainConfig
    values: dict[str, Any]
    origins: dict[str, str]


def config_of(recipe: str, file: str | None, options: dict[str, Any], settings: Iterable[str]) -> Given:
    """Lay `options`, by field, and `settings` such as ``loss.queue=4096`` over a file, and that over a recipe.

    Raises UsageError or BadParameter, with the option that is wrong.
    """
    layers = _Layers(recipe)
    if file:
        for name, value in read_config(file, layers.values, FIELDS).items():
            layers.lay(name, value, file)
    for name, value in options.items():
        layers.lay(name, _weights(name, value) if name in WEIGHTS else value, _option(name))
    for setting in settings:
        layers.lay(*_read_setting(setting, layers), "--set")
    if not layers.values["texts"] and not any(map(layers.values.get, _OF_TEXTS)):
        layers.values["texts"] = None
    missing = [_option(name) for name in ("images", "texts", "out") if layers.values[name] == ""]
    if missing:
        what = f"Missing {', '.join(missing)}: give {'them' if missing[1:] else 'it'}, or a --config file that has"
        what += " them" if missing[1:] else " it"
        if "--texts" in missing and layers.values["captions"]:
            what += "; where there are no other sentences, --texts may be the store of the captions"
        raise click.UsageError(what)
    config = layers.config()
    return Given(config, flat(config.to_json()), layers.origins)


class _Layers:
    """The value and the origin of every field, by its whole name."""

    def __init__(self, recipe: str) -> None:
        begun = RECIPES[recipe]("", "", "")
        self.values, self.student = flat(begun.to_json()), begun.student
        self.origins = {name: f"recipe {recipe}" if by else "default" for name, (_, by) in set_by(begun).items()}

    def lay(self, name: str, value: Any, origin: str) -> None:
        """Lay a value over what is there. A part's mapping has the values of its fields. Another student than the
        recipe's has its own image size in place of the recipe's."""
        if name == "student" and value != self.student and self.origins["image_size"].startswith("recipe "):
            self.lay("image_size", None, "default")
        if isinstance(value, dict) and name in WEIGHTS:
            given = {f"{name}.{field}": one for field, one in value.items()}
            if set(value) & set(WEIGHTS[name]):
                given = {**dict.fromkeys((f"{name}.{weight}" for weight in WEIGHTS[name]), 0.0), **given}
        else:
            given = {name: value}
        for field, one in given.items():
            self.values[field], self.origins[field] = one, origin

    def config(self) -> TrainConfig:
        """The config. Raises BadParameter for values of the wrong kind, with the option or file that has them."""
        raw: dict[str, Any] = {}
        for name, value in self.values.items():
            part, dot, field = name.partition(".")
            if dot:
                raw.setdefault(part, {})[field] = value
            else:
                raw[name] = value
        try:
            return TrainConfig.parse(raw, "")
        except SchemaError as error:
            origin = {problem: self.origins.get(problem.path.partition("[")[0], "") for problem in error.problems}
            first = origin[error.problems[0]]
            message = "; ".join(str(problem) for problem in error.problems if origin[problem] == first)
            hint = first if first.startswith("--") else f"--config {first}"
            raise click.BadParameter(message, param_hint=hint) from None


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields by their whole names."""
    found: dict[str, Any] = {}
    for name, value in raw.items():
        found |= {f"{name}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def set_by(recipe: TrainConfig) -> dict[str, tuple[Any, bool]]:
    """Each field by its whole name: its value, and whether that is the recipe's and no default."""
    defaults = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}
    usual = flat(to_plain({name: value for name, value in defaults.items() if value is not MISSING}))
    usual |= {f"loss.{name}": value for name, value in vars(LossConfig()).items() if name not in LossConfig.WEIGHTS}
    values = flat(recipe.to_json())
    return {name: (value, name not in usual or usual[name] != value) for name, value in values.items()}


def shown(value: Any) -> str:
    """The value of a field, as --set takes it; nothing as a hyphen."""
    if value is None or value == []:
        return "-"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _option(name: str) -> str:
    """The option that gives a field: --images is repeated for `more_images`."""
    return f"--{name.removeprefix('more_').replace('_', '-')}"


def _weights(name: str, text: str) -> dict[str, float]:
    """The weights in ``vl=0.7,pvl=0.3``; those that are not named are 0."""
    values = dict.fromkeys(WEIGHTS[name], 0.0)
    for part in text.split(","):
        weight, _, value = part.partition("=")
        if weight not in values:
            near = did_you_mean(weight, values, f"there are {', '.join(values)}; {FIELDS} says what they are")
            raise click.BadParameter(f"{weight!r} is not known: {near}", param_hint=_option(name))
        try:
            values[weight] = float(value)
        except ValueError:
            raise click.BadParameter(f"{part!r} is not NAME=NUMBER", param_hint=_option(name)) from None
    return values


def _read_setting(setting: str, layers: _Layers) -> tuple[str, Any]:
    """Field and value of ``loss.queue=4096``. A value is read as JSON, or as a string if it is none."""
    name, equals, text = setting.partition("=")
    known = {*layers.values, *WEIGHTS}
    if name not in known:
        near = did_you_mean(name, known, f"{FIELDS} lists all")
        raise click.BadParameter(f"no field is called {name!r}: {near}", param_hint="--set")
    if not equals:
        raise click.BadParameter(f"{setting!r} is not FIELD=VALUE, such as {name}=1", param_hint="--set")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text
