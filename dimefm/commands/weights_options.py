"""The options of a teacher's weights, the same for every command that takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

_FIELDS = ("mean", "std", "interpolation", "resize_mode", "activation", "assume_openai")


class _Colours(click.ParamType[tuple[float, float, float]]):
    """`0.5,0.5,0.5` as three numbers."""

    name = "R,G,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        try:
            red, green, blue = value if isinstance(value, tuple) else map(float, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not three numbers such as 0.5,0.5,0.5", param, ctx)
        return red, green, blue


def weights_options(command: Callable[..., None]) -> Callable[..., None]:
    """--pretrained, and what has to be said where it is a file that says too little: the command is given `pretrained`
    and `trained`, a dimefm.models.pretraining.Trained."""

    @wraps(command)
    def with_trained(**options: Any) -> None:
        from dimefm.models.pretraining import Trained

        model = options.get("teacher") or options["model"]
        if options["pretrained"] and (model.startswith(("hf-hub:", "local-dir:")) or Path(model).is_dir()):
            raise click.UsageError(f"--pretrained has no effect with {model}, which has weights of its own")
        said = {name: options.pop(name) for name in _FIELDS}
        command(**options, trained=Trained(**said))

    resize_modes = click.Choice(["shortest", "longest", "squash"])
    options: list[Callable[[Any], Any]] = [
        click.option("--pretrained", help="Tag or file of its weights, with a plain NAME."),
        click.option("--mean", type=_Colours(),
                     help="Mean colour, from 0 to 1, with which the weights in a FILE were trained. Needed where no "
                          "known tag of NAME says it."),
        click.option("--std", type=_Colours(), help="Their standard deviation; needed as --mean is."),
        click.option("--interpolation", type=click.Choice(["bicubic", "bilinear"]),
                     help="How their images were resized; needed as --mean is."),
        click.option("--resize-mode", type=resize_modes, help="To what they were resized; needed as --mean is."),
        click.option("--activation", type=click.Choice(["gelu", "quick_gelu"]),
                     help="Activation of the weights in a FILE; needed where known tags differ."),
        click.option("--assume-openai", is_flag=True, help="Take OpenAI's preprocessing for the weights in a FILE."),
    ]  # fmt: skip
    decorated: Callable[..., None] = with_trained
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
