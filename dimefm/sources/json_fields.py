"""Sentences in values of JSON: in a field of objects, which may be a field of objects within, or of those in lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dimefm.errors import SourceError

DEFAULT_COLUMNS = ("text", "caption", "sentence", "TEXT")
"""Columns and fields that are taken where none is named."""

_MOST_NAMES, _DEEPEST = 200, 4  # of fields that are looked at for their names
_IN_A_LIST = 5  # elements of a list that are
_MOST_SHOWN = 50


class NoColumnError(SourceError):
    """A table has no column of sentences, or not the one that was asked for: raised before the first of them.
    `example` is the table and what it has."""

    def __init__(self, what: str, example: str, *, remedy: str) -> None:
        self.example = example
        super().__init__(what, remedy=remedy)


FieldValue = tuple[str, str | None, str]
"""A value: where it is (in its file, or in the lists that it is in, as `3:0`), its text, and where that is None why, as
what follows `values`."""


def values_at(value: Any, field: str, place: str = "") -> Iterator[FieldValue]:
    """The strings in a field, FIELD or OUTER.INNER, of what is at `place`: one, or all those of a list. Without a field
    those that `value` is itself."""
    return _at(value, field.split(".") if field else [], place)


def _at(value: Any, names: list[str], place: str) -> Iterator[FieldValue]:
    if isinstance(value, list):
        if not value:
            yield place, None, "that are an empty list"
        for number, one in enumerate(value):
            yield from _at(one, names, f"{place}:{number}" if place else str(number))
    elif names and isinstance(value, dict):
        whole = ".".join(names)  # a name may have dots in it
        if whole in value:
            yield from _at(value[whole], [], place)
        elif names[0] in value:
            yield from _at(value[names[0]], names[1:], place)
        else:
            yield place, None, f"without {whole!r}"
    elif names:
        yield place, None, "that are no JSON objects"
    elif value is None:
        yield place, None, "that are null"
    else:
        yield (place, value, "") if isinstance(value, str) else (place, None, "that are no strings")


def field_names(values: Iterable[Any]) -> list[str]:
    """The fields in which objects hold something else than objects, OUTER.INNER, as they come."""
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
    """`column`, or the first of DEFAULTS that is there. Raises NoColumnError with what is there."""
    wanted = DEFAULT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    there = ", ".join([*names[:_MOST_SHOWN], *(["..."] if len(names) > _MOST_SHOWN else [])]) or "no column of strings"
    what = f"{path} has no column {' or '.join(map(repr, wanted))}; there is: {there}"
    remedy = f"name the column with the sentences: --column NAME{or_else}"
    raise NoColumnError(what, f"{path}, which has {there}", remedy=remedy)
