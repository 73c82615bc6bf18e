"""Sentences in .json files: lists of strings or of objects, and objects that hold such lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.json_fields import DEFAULT_COLUMNS, FieldValue, choose_column, field_names, values_at
from dimefm.sources.text_lines import READ_ERRORS, DamagedTextError, NotTextError, encoding_of, open_text
from dimefm.sources.text_tables import JsonLines, Table, parse_json_line

MOST_BYTES = 512 << 20
"""Most characters of a .json file, which is read whole."""

_LONGEST_LINE = 1 << 24  # characters of the first line that are read to find out whether the file is JSON lines
_HEAD = 100  # objects of a list that are searched for their fields
_WHITE = re.compile(r"[ \t\n\r\ufeff]*")
_decode = json.JSONDecoder().raw_decode


class JsonArray(Table):
    """A .json or .json.gz file, which is read whole, unless it holds JSON lines.

    It may be a list of strings; a list of objects with the sentence in one of their fields; an object that holds such a
    list, such as COCO's annotations.caption; or an object whose values are all sentences, or lists of them. The key of
    a sentence is file:N, counted from 0, with a further :N for each list within.
    """

    unit = "element"

    def check(self) -> None:
        """As Table.check."""
        lines = self._as_lines()
        return lines.check() if lines else super().check()

    def samples(self, account: Account) -> Iterator[TextSample]:
        """As Table.samples. Raises SourceError too for a file of more than MOST_BYTES characters."""
        lines = self._as_lines()
        return lines.samples(account) if lines else super().samples(account)

    def _as_lines(self) -> JsonLines | None:
        """The file as JSON lines, if its first line is a whole object and not the only line."""
        try:
            with open_text(self._path) as file:
                first = file.readline(_LONGEST_LINE)
                second = file.readline(_LONGEST_LINE)
        except (*READ_ERRORS, NotTextError):
            return None  # it is raised again, and reported, when the samples are read
        has_lines = second.strip() and isinstance(parse_json_line(first), dict)
        return JsonLines(self._file, self._column) if has_lines else None

    def _open_and_check(self) -> None:
        next(self._values(Account()), None)

    def _values(self, account: Account) -> Iterator[FieldValue]:
        text = self._text()
        start = _end_of_white(text, 0)
        if start == len(text):
            return
        if text[start] != "[":
            yield from self._in_document(_document(text, start))
            return
        objects = (one for one in _elements_before_damage(text, start) if isinstance(one, dict))
        names = field_names(islice(objects, _HEAD))
        field = choose_column(names, self._column, self._path) if names or self._column is not None else ""
        for number, value in enumerate(_elements(text, start)):
            yield from values_at(value, field, str(number))

    def _in_document(self, document: Any) -> Iterator[FieldValue]:
        """The sentences of a file that is one value, not a list."""
        values = list(document.values()) if isinstance(document, dict) else []
        if len(values) > 1 and all(isinstance(value, dict) for value in values):  # objects by key, as a list of them
            names = field_names(islice(values, _HEAD))
            for field in [self._column] if self._column is not None else DEFAULT_COLUMNS:
                if field in names:
                    yield from values_at(values, field)
                    return
        names = field_names([document])
        fields = [self._column] if self._column else _default_fields(names)
        if not fields and values and all(map(_is_text, values)):
            found = values_at(values, "")
        elif len(fields) > 1:
            found = chain.from_iterable(values_at(document, field, field) for field in fields)
        else:
            field = choose_column(names, fields[0] if fields else None, self._path)
            found = values_at(document, field)
        for place, value, why in found:
            yield place or "0", value, why

    def _text(self) -> str:
        with open_text(self._path) as file:
            self._encoding = encoding_of(file)
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            what = f"{self._path} is larger than {MOST_BYTES >> 20} MB, and a .json file is read whole"
            remedy = "write it as JSON lines, which may be of any size: jq -c '.[]' A.json > A.jsonl"
            raise SourceError(what, remedy=remedy)
        return text


def _default_fields(names: list[str]) -> list[str]:
    """The fields whose last part is the first of DEFAULT_COLUMNS that there is: several where a file has a list for
    each of its splits."""
    for wanted in DEFAULT_COLUMNS:
        if fields := [name for name in names if name.rpartition(".")[2] == wanted]:
            return fields
    return []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _end_of_white(text: str, place: int) -> int:
    match = _WHITE.match(text, place)
    return match.end() if match else place


def _document(text: str, start: int) -> Any:
    value, end = _decoded(text, start)
    if _end_of_white(text, end) < len(text):
        raise DamagedTextError(f"something follows the first value, from character {end:,}")
    return value


def _elements(text: str, start: int) -> Iterator[Any]:
    """The elements of the list that begins at `start`, one at a time: all of them as objects would take ten times the
    memory of the text."""
    place = _end_of_white(text, start + 1)
    separator = "," if text[place : place + 1] != "]" else "]"
    while separator == ",":
        value, place = _decoded(text, place)
        yield value
        place = _end_of_white(text, place)
        separator = text[place : place + 1]
        if separator == ",":
            place = _end_of_white(text, place + 1)
    if separator != "]":
        raise DamagedTextError(f"no comma or end of the list at character {place:,}")
    if _end_of_white(text, place + 1) < len(text):
        raise DamagedTextError(f"something follows the list, from character {place + 1:,}")


def _elements_before_damage(text: str, start: int) -> Iterator[Any]:
    with suppress(DamagedTextError):
        yield from _elements(text, start)


def _decoded(text: str, place: int) -> tuple[Any, int]:
    try:
        return _decode(text, place)
    except (ValueError, RecursionError, StopIteration) as error:
        raise DamagedTextError(f"not JSON: {error}") from None
