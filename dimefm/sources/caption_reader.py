"""Reads the captions of images, and counts what cannot be used, for every kind of source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dimefm.sources.account import Account
from dimefm.sources.text_lines import NotTextError, clean, report_replaced, why_nothing_left

MOST_CAPTIONS = 64
"""Captions of an image that are used: alignment has room for as many for each image as the one with the most has."""

MOST_BYTES = 64 << 20
"""Bytes of a file of captions of one image."""


@dataclass
class CaptionReader:
    """Reads the captions of images one after the other, and counts what cannot be used. `place` is what a problem is
    about: a tar, a table or a folder."""

    place: str
    account: Account
    replaced: int = field(default=0, init=False)

    def of_file(self, data: bytes, json_field: str | None, where: str) -> tuple[str, ...]:
        """The captions in the bytes of a text or JSON file that lies beside an image."""
        from dimefm.sources.tar_texts import values_in  # most images are read without their captions

        if not data:
            self.account.skip("files of captions that are empty", where)
            return ()
        try:
            found = values_in(data, json_field)
        except NotTextError as error:
            self.account.skip(f"files of captions that are no text: {error}", where)
        except (ValueError, RecursionError):
            self.account.skip("files of captions that are no JSON", where)
        else:
            for _, value, why in found:
                if value is None and why != "that are null":  # which is a way to say that there is none
                    self.account.skip(f"captions in .json files {why}", where)
            return self.of_values((value for _, value, _ in found), where)
        return ()

    def of_values(self, values: Iterable[str | None], where: str) -> tuple[str, ...]:
        """The captions in some strings; None stands for no caption. The same one twice counts once."""
        captions: dict[str, None] = {}
        for value in values:
            if value is None:
                continue
            if text := clean(value):
                self.replaced += "\ufffd" in text
                if text in captions:
                    self.account.skip("captions that an image has twice", where)
                captions.setdefault(text)
            else:
                self.account.skip(f"captions {why_nothing_left(value)}", where)
        if len(captions) > MOST_CAPTIONS:
            reason = f"captions of an image beyond its first {MOST_CAPTIONS}"
            self.account.skip(reason, where, len(captions) - MOST_CAPTIONS)
        return tuple(captions)[:MOST_CAPTIONS]

    def finish(self) -> None:
        """Report the bytes that were replaced."""
        report_replaced(self.place, "captions", self.replaced, self.account)
