"""Sentences in JSON values: in a field of an object, of an object within it, or of the objects in a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dimefm.errors import SourceError
from dimefm.system.near_names import did_you_mean

DEFAULT_COLUMNS = ("text", "caption", "sentence", "TEXT", "title")
"""The columns or fields of which the first that exists is taken where none is named."""

_MOST_NAMES, _DEEPEST = 200, 4  # fields whose names are collected: how many, and down to which depth
_IN_A_LIST = 5  # elements of a list that are searched for names
_MOST_SHOWN = 50


class NoColumnError(SourceError):
    """A table has no column of sentences, or not the one that was asked for; raised before the first sentence.
    `example` is the path of the table and the columns that it has."""

    def __init__(self, what: str, example: str, *, remedy: str) -> None:
        self.example = example
        super().__init__(what, remedy=remedy)


FieldValue = tuple[str, str | None, str]
"""A value: its place (in the file, then in each list around it, as `3:0`); its text, or None; and if None, the reason,
in words that follow `values`."""


def values_at(value: Any, field: str, place: str = "") -> Iterator[FieldValue]:
    """What a field, FIELD or OUTER.INNER, of the value at `place` holds: one value, or each of a list. An empty field
    means the value itself."""
    if isinstance(value, list):
        if not value:
            yield place, None, "that are an empty list"
        for number, one in enumerate(value):
            yield from values_at(one, field, f"{place}:{number}" if place else str(number))
    elif field:
        outer, _, inner = field.partition(".")
        if not isinstance(value, dict):
            yield place, None, "that are no JSON objects"
        elif field in value:  # a name may have dots in it
            yield from values_at(value[field], "", place)
        elif outer in value:
            yield from values_at(value[outer], inner, place)
        else:
            yield place, None, f"without {field!r}"
    elif isinstance(value, str):
        yield place, value, ""
    else:
        yield place, None, "that are null" if value is None else "that are no strings"


def field_names(values: Iterable[Any]) -> list[str]:
    """The names, as FIELD or OUTER.INNER, of the fields that do not hold further objects, in the order in which they
    come."""
    names: dict[str, None] = {}
    for value in values:
        _collect(value, "", names, 0)
    return list(names)


def _collect(value: Any, name: str, names: dict[str, None], depth: int) -> None:
    if isinstance(value, dict) and depth < _DEEPEST:
        for key, one in value.items():
            if len(names) < _MOST_NAMES:
                _collect(one, f"{name}.{key}" if name else str(key), names, depth + 1)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value[:_IN_A_LIST]):
        for one in value[:_IN_A_LIST]:
            _collect(one, name, names, depth)
    elif name:
        names.setdefault(name)


def choose_column(names: list[str], column: str | None, path: str, or_else: str = "") -> str:
    """`column`, or the first of DEFAULT_COLUMNS, if `names` has it. Raises NoColumnError, which shows the names that
    are most like `column`, or else all."""
    wanted = DEFAULT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    shown = ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")
    what = f"{path} has no column {' or '.join(map(repr, wanted))}"
    remedy = did_you_mean(column or "", names)
    if not remedy:
        what += f", only {shown}" if names else ", and none of strings"
        remedy = f"name the column with the sentences: --column NAME{or_else}"
    raise NoColumnError(what, f"{path}, which has {shown or 'no column of strings'}", remedy=remedy)
