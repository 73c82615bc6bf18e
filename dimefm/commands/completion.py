"""What a shell offers when Tab is pressed within an argument: files, or names of models.

click offers commands, options and choices by itself.
"""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

_PLACES = {
    "captions", "captions_out", "checkpoint", "classes_from", "config", "config_file", "data", "evaluation", "folder",
    "folders", "images", "images_from", "index", "init", "latency", "model", "models", "order", "out", "pairs", "path",
    "paths", "pretrained", "queries", "run", "scores", "selection", "sources", "store", "templates", "texts", "val",
    "val_texts",
}  # fmt: skip
"""Names, in Python, of arguments and options that take a path."""

_MODELS = {"teacher", "student", "text_student"}


class _Path(click.types.StringParamType):
    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class _Model(click.types.StringParamType):
    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from dimefm.models.names import CONFIGURED, architectures, timm_names

        names = [*architectures(), *(CONFIGURED if param.name == "teacher" else ())]
        if param.name == "student" and incomplete:  # timm has more than a thousand
            names += sorted(timm_names())
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def completed(parameter: click.Parameter) -> click.ParamType[Any]:
    """The type of a parameter, or for a string that is a path or a model one that a shell can complete."""
    if type(parameter.type) is click.types.StringParamType:
        if parameter.name in _MODELS:
            return _Model()
        if parameter.name in _PLACES:
            return _Path()
    return parameter.type
