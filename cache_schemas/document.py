"""From JSON to a frozen dataclass and back. All problems are reported at once, each with its path.

A schema is a frozen dataclass whose type hints are the format: `parse` compares the JSON with them. Supported hints are
int, float, str, bool, object, None in unions, Literal, tuple[X, ...], dict[str, X] and other dataclasses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from functools import cache
from typing import Any, ClassVar, Literal, Self, Union

from cache_schemas.problems import Problem, SchemaError

CHECKSUM = "checksum"

LATER = {"later": True}
"""Metadata of a field that a later release has added: at its default it is left out of what is written and digested, so
that documents, and the digests that others have recorded of them, are as they were before."""

_T = typing.TypeVar("_T")
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def parse_dataclass(cls: type[_T], raw: object, where: str) -> _T:
    """Parse plain JSON data into dataclass `cls`.

    Raises SchemaError naming every missing, unknown or wrongly typed field; `where` says which file it came from.
    """
    problems: list[Problem] = []
    value = _dataclass(cls, raw, "", problems)
    if problems:
        raise SchemaError(where, cls.__name__, problems)
    return typing.cast(_T, value)


def to_plain(value: object) -> Any:
    """A dataclass (or tuple, dict, scalar) as plain JSON data, which `parse_dataclass` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: to_plain(v) for f, v in fields if not ("later" in f.metadata and v == f.default)}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def digest_of(value: object) -> str:
    """sha256 of the canonical JSON of `value` (sorted keys, no spaces), as hex."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Base of every JSON document that dimefm writes. A document carries the name and version of its schema, and a
    checksum of itself, by which a flipped bit is found wherever it is."""

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @classmethod
    def parse(cls, raw: object, where: str) -> Self:
        """Parse `raw`, read from `where`. Raises SchemaError with every problem, or for a version not known here."""
        if not isinstance(raw, dict):
            raise SchemaError(where, cls.SCHEMA, [Problem("", f"expected an object, found {_show(raw)}")])
        name, version = raw.get("schema"), raw.get("version")
        if name != cls.SCHEMA:
            what = f"expected {cls.SCHEMA!r}, found {_show(name)}: look whether two paths were swapped"
            raise SchemaError(where, cls.SCHEMA, [Problem("schema", what)])
        if version != cls.VERSION:
            what = f"version {_show(version)} is not readable here; this release reads version {cls.VERSION}"
            remedy = "install the dimefm release that wrote it, or write it again with this one"
            raise SchemaError(where, cls.SCHEMA, [Problem("version", f"{what}. {remedy}")])
        problems: list[Problem] = []
        body = {k: v for k, v in raw.items() if k not in ("schema", "version", CHECKSUM)}
        value = _dataclass(cls, body, "", problems)
        if not problems:
            problems = list(typing.cast(Self, value).problems())
        if not problems and raw.get(CHECKSUM) != digest_of({k: v for k, v in raw.items() if k != CHECKSUM}):
            problems = [Problem(CHECKSUM, "does not fit the rest: the document was damaged or edited by hand")]
        if problems:
            raise SchemaError(where, cls.SCHEMA, problems)
        return typing.cast(Self, value)

    def problems(self) -> list[Problem]:
        """Problems that the types cannot express, such as those between fields. Subclasses override it."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data: `schema` and `version`, the fields, and the sha256 of all of them as `checksum`."""
        body = {"schema": self.SCHEMA, "version": self.VERSION, **to_plain(self)}
        return {**body, CHECKSUM: digest_of(body)}


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dataclass(cls: type[Any], raw: object, path: str, problems: list[Problem]) -> Any:
    if not isinstance(raw, dict):
        problems.append(Problem(path, f"expected an object, found {_show(raw)}"))
        return None
    fields = _fields(typing.cast(Any, cls))
    for name in raw:
        if name not in fields:
            problems.append(Problem(_join(path, str(name)), "unknown field"))
    values, before = {}, len(problems)
    for name, (hint, required) in fields.items():
        if name in raw:
            values[name] = _value(hint, raw[name], _join(path, name), problems)
        elif required:
            problems.append(Problem(_join(path, name), "missing"))
    return cls(**values) if len(problems) == before else None


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """The type hint of each field and whether it is required. Cached, since to work out hints takes 50 microseconds."""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    }


def _value(hint: Any, raw: object, path: str, problems: list[Problem]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _optional(args, raw, path, problems)
    if origin is Literal:
        if raw not in args:
            problems.append(Problem(path, f"expected one of {', '.join(map(repr, args))}, found {_show(raw)}"))
        return raw
    if origin is tuple:
        return _tuple(args, raw, path, problems)
    if origin is dict:
        if not isinstance(raw, dict):
            problems.append(Problem(path, f"expected an object, found {_show(raw)}"))
            return None
        return {str(k): _value(args[1], v, _join(path, str(k)), problems) for k, v in raw.items()}
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint), raw, path, problems)
    return _scalar(hint, raw, path, problems)


def _optional(args: tuple[Any, ...], raw: object, path: str, problems: list[Problem]) -> Any:
    if raw is None and type(None) in args:
        return None
    (inner,) = (a for a in args if a is not type(None))
    return _value(inner, raw, path, problems)


def _tuple(args: tuple[Any, ...], raw: object, path: str, problems: list[Problem]) -> Any:
    if not isinstance(raw, (list, tuple)):
        problems.append(Problem(path, f"expected a list, found {_show(raw)}"))
        return None
    hints = [args[0]] * len(raw) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(hints) != len(raw):
        problems.append(Problem(path, f"expected {len(hints)} items, found {len(raw)}"))
        return None
    pairs = zip(hints, raw, strict=True)
    return tuple(_value(h, v, f"{path}[{i}]", problems) for i, (h, v) in enumerate(pairs))


def _scalar(hint: Any, raw: object, path: str, problems: list[Problem]) -> Any:
    if hint in (object, Any):
        return raw
    number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    if hint is float and number:
        return float(typing.cast(float, raw))
    if hint is int and isinstance(raw, bool):
        problems.append(Problem(path, f"expected an integer, found {_show(raw)}"))
    elif not isinstance(raw, hint):
        problems.append(Problem(path, f"expected {_NAMES.get(hint, hint.__name__)}, found {_show(raw)}"))
    return raw


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
