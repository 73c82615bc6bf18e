"""The definitions of the known sets, which ship in sets/: class names, templates and class folders."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from cache_schemas.document import parse_dataclass
from cache_schemas.evaluation import SetDefinition
from cache_schemas.problems import Problem, SchemaError

PLACEHOLDER = "{c}"
"""What stands for the class name in a template."""


@functools.cache
def load_definitions() -> dict[str, SetDefinition]:
    """Every definition by the name of its set, in the order of the names. Raises SchemaError, which names the file, for
    a definition that is not valid."""
    files = [f for f in (resources.files("dimefm.datasets") / "sets").iterdir() if f.name.endswith(".json")]
    parsed = [parse_definition(f.read_text(encoding="utf-8"), f.name) for f in files]
    return {d.name: d for d in sorted(parsed, key=lambda d: d.name)}


def parse_definition(text: str, where: str) -> SetDefinition:
    """The definition in `text`, the JSON of the file `where`, which must be called SET.json. Raises SchemaError."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as e:
        raise SchemaError(where, SetDefinition.__name__, [Problem("", f"not JSON: {e}")]) from e
    definition = parse_dataclass(SetDefinition, raw, where)
    problems = definition.problems()
    if where != f"{definition.name}.json":
        problems.append(Problem("name", f"is {definition.name!r}, but the file is {where}"))
    if problems:
        raise SchemaError(where, SetDefinition.__name__, problems)
    return definition


def class_names(definition: SetDefinition) -> list[str]:
    """The class names in the order of the labels; empty for a retrieval set."""
    if definition.classes_from is None:
        return list(definition.classes)
    names = _imagenet()
    return [names[wnid] for wnid in definition.subset or names]


def class_folders(definition: SetDefinition) -> list[str]:
    """The names of the class folders in the order of the labels: the class names, unless the definition has others."""
    if definition.folders_from == "wnid":
        return list(definition.subset or _imagenet())
    return list(definition.folders) or class_names(definition)


def templates(definition: SetDefinition) -> list[str]:
    """The prompt templates, with {c} in place of the class name."""
    if definition.templates_from is None:
        return list(definition.templates)
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template(PLACEHOLDER) for template in OPENAI_IMAGENET_TEMPLATES]


@functools.cache
def _imagenet() -> dict[str, str]:
    """From each WordNet id of ImageNet-1k to its class name, in the order of the labels."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    return dict(zip(info.label_names(), IMAGENET_CLASSNAMES, strict=True))
