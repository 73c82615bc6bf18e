"""A config file: the fields of a config in YAML or JSON, as `--config` takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from dimefm.system.near_names import did_you_mean


def read_config(path: str, known: Collection[str], listing: str) -> dict[str, Any]:
    """The fields of a config file. JSON where the name ends with .json, else YAML; of a run.json, its config.

    `known` are the names of all fields; a field of a part is called as --set calls it, `loss.vl`, and stands in the
    file in a mapping `loss`, or with its whole name. `listing` says where the user finds all of them. Raises
    BadParameter, which names --config, for a file that is not there or cannot be parsed, and for unknown fields.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise _wrong(f"{path} cannot be read: {what}") from None
    fields = _parse_json(text, path) if path.endswith(".json") else _parse_yaml(text, path)
    if isinstance(fields, dict) and "schema" in fields and isinstance(fields.get("config"), dict):
        fields = fields["config"]  # a whole run.json
    if not isinstance(fields, dict):
        found = "nothing" if fields is None else f"a {type(fields).__name__}"
        raise _wrong(f"{path} must hold fields with values, such as `lr: 1e-3`, and holds {found}")
    unknown = [f"no field is called {name!r}: {_remedy(name, known, listing)}" for name in _unknown(fields, known, "")]
    if unknown:
        raise _wrong("\n  ".join([path, *unknown]))
    return fields


def _wrong(message: str) -> click.BadParameter:
    return click.BadParameter(message, param_hint="--config")


def _remedy(name: str, known: Collection[str], listing: str) -> str:
    return did_you_mean(name, known, f"{listing} lists all")


def _unknown(fields: dict[Any, Any], known: Collection[str], prefix: str) -> list[str]:
    """The names in the file, with the part that they are in, that are neither a field nor a part of the config."""
    found = []
    for field, value in fields.items():
        name = f"{prefix}{field}"
        if isinstance(value, dict) and any(one.startswith(f"{name}.") for one in known):
            found += _unknown(value, known, f"{name}.")
        elif name not in known and not any(one.startswith(f"{name}.") for one in known):
            found.append(name)
    return found


def _parse_json(text: str, path: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (name, _) in enumerate(pairs):
            if name in dict(pairs[:number]):
                raise _wrong(f"{path}: {name!r} stands twice in one mapping")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except json.JSONDecodeError as error:
        raise _wrong(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


def _parse_yaml(text: str, path: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Numbers such as 1e-3 are numbers, as in YAML 1.2; a name that stands twice is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key for key, _ in node.value]
            for number, key in enumerate(keys):
                if key.value in [earlier.value for earlier in keys[:number]]:
                    what = f"{key.value!r} stands twice in one mapping"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            return dict(super().construct_mapping(node, deep))

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _wrong(f"{path} is not YAML: {where}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character or a date that cannot be
        raise _wrong(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
