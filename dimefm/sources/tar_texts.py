"""Sentences in the members of tars, one sample per key, as WebDataset and img2dataset write them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from cache_schemas.plan import SourceFile
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample, split_key
from dimefm.sources.file_names import HIDDEN_MEMBERS, is_hidden_member, why_member_not_read
from dimefm.sources.forward_reader import open_window
from dimefm.sources.json_fields import FieldValue, values_at
from dimefm.sources.tar import tar_members
from dimefm.sources.text_lines import NotTextError, as_text, clean, report_replaced, why_nothing_left
from dimefm.sources.walk_folder import cannot_read

_MOST_BYTES = 64 << 20


class TarTexts:
    """A tar whose sentences are the lines of its .txt members, or with `column` that field of its .json members.

    The key of a sentence is that of its member: its name up to the first dot after the last slash. In a member with
    several sentences, :LINE follows, or :N for the place in each list.
    """

    def __init__(self, file: SourceFile, column: str | None = None) -> None:
        self._file, self._path, self._column = file, file.path, column

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every sentence, by member. Other members, and values that are not sentences, are counted."""
        wanted = "txt" if self._column is None else "json"
        replaced = 0
        try:
            with open_window(self._path) as window:
                for name, offset, size in tar_members(self._path, account):
                    key, extension = split_key(name)
                    place = f"{self._path}: {name}"
                    if is_hidden_member(name, key):
                        account.skip(HIDDEN_MEMBERS, place)
                    elif extension != wanted:
                        account.skip(_why_not_used(extension), place)
                    elif size > _MOST_BYTES:
                        account.skip(f"members of tars with more than {_MOST_BYTES >> 20} MB of text", place)
                    elif len(data := window.get(offset, size)) < size:
                        account.skip("members of tars that are cut short", place)
                    else:
                        for sample in self._sentences(key, data, place, account):
                            replaced += "\ufffd" in sample.text
                            yield sample
        except OSError as error:
            raise cannot_read(self._path, error) from error
        report_replaced(self._path, "sentences", replaced, account)

    def _sentences(self, key: str, data: bytes, place: str, account: Account) -> Iterator[TextSample]:
        if not data:
            account.skip("empty members of tars", place)
            return
        try:
            found = values_in(data, self._column)
        except NotTextError as error:
            account.skip(f"members of tars that are no text: {error}", place)
        except (ValueError, RecursionError):
            account.skip("members of tars that are no JSON", place)
        else:
            what = "lines of .txt members" if self._column is None else "values in .json members"
            for where, value, why in found:
                if value is None:
                    account.skip(f"{what} {why}", place)
                elif text := clean(value):
                    yield TextSample(key if len(found) == 1 else f"{key}:{where}", text)
                else:
                    account.skip(f"{what} {why_nothing_left(value)}", place)


def values_in(data: bytes, column: str | None) -> list[FieldValue]:
    """The lines of a text, or with `column` what that field of its JSON holds. Raises NotTextError, or ValueError or
    RecursionError for what is no JSON."""
    with as_text(io.BufferedReader(io.BytesIO(data))) as file:
        if column is None:
            return [(str(number), line, "") for number, line in enumerate(file, 1)]
        return list(values_at(json.load(file), column))


def _why_not_used(extension: str) -> str:
    how = " (--column NAME reads a field of them)" if extension == "json" else ""
    return why_member_not_read(extension) + how
