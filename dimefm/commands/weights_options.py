"""The options that say what a model's weights are, the same for every command that takes a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click

from cache_schemas.identity import Activation, Interpolation, ResizeMode
from dimefm.commands.help import under
from dimefm.commands.options import fields_of, options_of

_TRAINED = ("dimefm.models.trained", "Trained")


class _Colours(click.ParamType[tuple[float, float, float]]):
    """`0.5,0.5,0.5` as three numbers."""

    name = "R,G,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        try:
            red, green, blue = map(float, value if isinstance(value, (tuple, list)) else value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not three numbers such as 0.5,0.5,0.5", param, ctx)
        return red, green, blue


def weights_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --pretrained, and the options for what a file of weights does not contain. The command gets `pretrained` and
    `trained`, a models.trained.Trained."""

    @wraps(command)
    def with_trained(**options: Any) -> None:
        from dimefm.models.trained import Trained

        given = {name: options.pop(name) for name in fields_of(*_TRAINED)}
        model = options.get("model") or options["teacher"]
        if options["pretrained"] and (model.startswith(("hf-hub:", "local-dir:")) or Path(model).is_dir()):
            raise click.UsageError(f"--pretrained has no effect with {model}, which has weights of its own")
        command(**options, trained=Trained(**given))

    option = options_of(*_TRAINED)
    options: list[Callable[[Any], Any]] = [
        options_of("pipeline.cache", "CacheConfig")("--pretrained"),
        option("--mean", type=_Colours()),
        option("--std", type=_Colours()),
        option("--interpolation", type=click.Choice(get_args(Interpolation))),
        option("--resize-mode", type=click.Choice(get_args(ResizeMode))),
        option("--activation", type=click.Choice(get_args(Activation))),
        option("--assume-openai", is_flag=True),
    ]
    decorated: Callable[..., None] = with_trained
    for option in reversed(options[1:]):
        decorated = under("Weights in a file", option(decorated))
    pretrained: Callable[[Callable[..., None]], Callable[..., None]] = options[0]
    return pretrained(decorated)
