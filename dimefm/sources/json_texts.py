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
"""Characters of a .json file, which is read whole."""

_LONGEST_LINE = 1 << 24  # characters of the first line of JSON lines
_HEAD = 100  # objects of a list that are looked at for their fields
_WHITE = re.compile(r"[ \t\n\r\ufeff]*")
_decode = json.JSONDecoder().raw_decode


class JsonArray(Table):
    """A .json or .json.gz file, read whole: a list of strings, or of objects with the sentence in one of their fields;
    an object that holds such a list, as COCO's annotations.caption; or one whose values are all sentences, or lists of
    them. Where it holds JSON lines it is read as such.

    The key of a sentence is file:N, counted from 0, and :N again for each list within.
    """

    unit = "element"

    def check(self) -> None:
        """As of any table."""
        lines = self._as_lines()
        return lines.check() if lines else super().check()

    def samples(self, account: Account) -> Iterator[TextSample]:
        """As of any table. Raises SourceError for a file of more than MOST_BYTES characters, too."""
        lines = self._as_lines()
        return lines.samples(account) if lines else super().samples(account)

    def _as_lines(self) -> JsonLines | None:
        """The file as JSON lines, if its first line is a whole object, and not the only one."""
        try:
            with open_text(self._path) as file:
                first = file.readline(_LONGEST_LINE)
                second = file.readline(_LONGEST_LINE)
                more = second.strip() and isinstance(parse_json_line(first), dict)
        except (*READ_ERRORS, NotTextError):
            return None  # which comes up again
        return JsonLines(self._file, self._column) if more else None

    def _open_and_check(self) -> None:
        for _ in self._values(Account()):
            return

    def _values(self, account: Account) -> Iterator[FieldValue]:
        text = self._text()
        start = _end_of_white(text, 0)
        if start == len(text):
            return
        if text[start] == "[":
            names = field_names(islice((one for one in _whole(text, start) if isinstance(one, dict)), _HEAD))
            field = choose_column(names, self._column, self._path) if names or self._column is not None else ""
            for number, value in enumerate(_elements(text, start)):
                yield from values_at(value, field, str(number))
        else:
            yield from self._of_document(_document(text, start))

    def _of_document(self, document: Any) -> Iterator[FieldValue]:
        if isinstance(document, dict) and len(document) > 1 and all(isinstance(one, dict) for one in document.values()):
            inner = field_names(islice(document.values(), _HEAD))  # objects by key: as a list of them
            if wanted := [one for one in (DEFAULT_COLUMNS if self._column is None else [self._column]) if one in inner]:
                yield from values_at(list(document.values()), wanted[0])
                return
        names = field_names([document])
        known = (name for known in DEFAULT_COLUMNS for name in names if name.rpartition(".")[2] == known)
        field = self._column or next(known, None)
        same = [
            name for name in names if field and not self._column and name.rpartition(".")[2] == field.rpartition(".")[2]
        ]
        values = list(document.values()) if isinstance(document, dict) else []
        if field is None and values and all(map(_is_text, values)):
            found = values_at(values, "")
        elif len(same) > 1:  # as in lists of two splits
            found = chain.from_iterable(values_at(document, name, name) for name in same)
        else:
            found = values_at(document, choose_column(names, field, self._path))
        for place, value, why in found:
            yield place or "0", value, why

    def _text(self) -> str:
        with open_text(self._path) as file:
            self._encoding = encoding_of(file)
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            what = f"{self._path} is larger than {MOST_BYTES >> 20} MB, and a .json file is read whole"
            raise SourceError(
                what, remedy="write it as JSON lines, which may be of any size: jq -c '.[]' A.json > A.jsonl"
            )
        return text


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
    """Those of the list that begins at `start`, one at a time: all as objects would take ten times the memory."""
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


def _whole(text: str, start: int) -> Iterator[Any]:
    """The elements before any damage."""
    with suppress(DamagedTextError):
        yield from _elements(text, start)


def _decoded(text: str, place: int) -> tuple[Any, int]:
    try:
        return _decode(text, place)
    except (ValueError, RecursionError, StopIteration) as error:
        raise DamagedTextError(f"not JSON: {error}") from None
