"""Text files as lines of str, whatever their encoding; and how the text of a sentence is cleaned."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from dimefm.images.decode import sniff
from dimefm.sources.account import Account
from dimefm.sources.files import open_seekable
from dimefm.sources.walk_folder import cannot_read
from dimefm.system.first_bytes import describe


class NotTextError(Exception):
    """A file is not text at all; the message says what it is."""


class DamagedTextError(Exception):
    """The content of a file breaks off, or is not what the name says; the message says where and how."""


READ_ERRORS = (EOFError, zlib.error, OSError, MemoryError, csv.Error, DamagedTextError)
"""What reading a text file or table raises where it is damaged, or cannot be read."""

_HEAD = 1 << 16  # bytes by which the encoding and the line ends are recognised
_MARKS = {  # the longer ones first: the mark of UTF-32 begins like that of UTF-16
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-8-sig": (codecs.BOM_UTF8,),
}
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})
_FEWEST, _SHARE = 4, 0.02  # a file with this number and share of control characters is not text
_UNUSABLE = re.compile("[\x01-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile(
    "[\x00-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u2060-\u206f"
    "\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]*"
)


@dataclass
class Reading:
    """How far a file was read."""

    place: int | str = 0
    """The last line, row or element, as keys name it."""
    replaced: int = 0
    """Those in which bytes were replaced."""
    encoding: str = "UTF-8"


@contextmanager
def reporting(path: str, unit: str, account: Account) -> Iterator[Reading]:
    """For a block that reads a file: report that it is no text, damaged (it is read as far as it goes) or empty, and
    that bytes were replaced. `unit` is what the file consists of, such as `line`. Raises SourceError where the file
    cannot be read."""
    reading = Reading()
    try:
        yield reading
    except NotTextError as error:
        account.problem(f"{path}: {error}; no sentence is taken from it")
    except READ_ERRORS as error:
        is_damage = isinstance(error, gzip.BadGzipFile) or not isinstance(error, OSError | MemoryError)
        if not is_damage:  # what the storage refuses for the moment would be missing for good
            raise cannot_read(path, error) from error
        account.problem(f"{path}: broken after {unit} {reading.place} ({error}); what follows is lost")
    else:
        if not reading.place:
            account.skip("empty files", path)  # with a header alone too
    report_replaced(path, f"{unit}s", reading.replaced, account, reading.encoding)


def report_replaced(path: str, units: str, count: int, account: Account, encoding: str = "UTF-8") -> None:
    """Report the units, such as lines, that hold U+FFFD for bytes that are not in the encoding."""
    if count:
        account.problem(f"{path}: {count} {units} are not {encoding}; the bad bytes were replaced")


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A text file as lines of str, as `as_text` gives them, decompressed if its name ends in .gz. Raises NotTextError
    for a file that is something else, OSError, and while it is read one of READ_ERRORS."""
    with open_seekable(path) as file:
        if path.lower().endswith(".gz"):
            head = _peek(file)
            if head and not head.startswith(b"\x1f\x8b"):
                raise NotTextError(f"its name ends in .gz, and it is {describe(head) or 'not gzip-compressed'}")
            with gzip.open(file) as plain, as_text(plain) as text:
                yield text
        else:
            with as_text(file) as text:
                yield text


def as_text(file: Any) -> TextIO:
    """A binary file with `peek`, read from its beginning, as lines of str.

    UTF-16 and UTF-32 are recognised by their byte order mark; everything else is UTF-8, and bytes that are not UTF-8
    become U+FFFD. Lines end in \\n or \\r\\n, and also in \\r if the first block holds no \\n, as on old Macs. Neither
    U+2028 nor U+0085 ends a line. Raises NotTextError for a file that is something else by its first bytes.
    """
    head = _peek(file)
    encoding = encoding_by_mark(head)
    if encoding.startswith("utf-8") and (what := _what_instead(head)):
        raise NotTextError(what)
    start = head.decode(encoding, errors="replace")
    newline = "\n" if "\n" in start or "\r" not in start else None
    return io.TextIOWrapper(file, encoding, errors="replace", newline=newline)


def encoding_by_mark(head: bytes) -> str:
    """The encoding of a file that begins with `head`, by its byte order mark; UTF-8 where there is none."""
    return next((name for name, marks in _MARKS.items() if head.startswith(marks)), "utf-8")


def encoding_of(file: TextIO) -> str:
    """The encoding of a text file as a message names it, such as `UTF-8`."""
    return file.encoding.removesuffix("-sig").upper()


def _peek(file: Any) -> bytes:
    """The first bytes, which stay to be read."""
    return bytes(file.peek(_HEAD)[:_HEAD])


def _what_instead(head: bytes) -> str | None:
    """What a file is, if its first bytes are not text in UTF-8; None if they may be."""
    if what := describe(head):
        return f"it is {what}"
    control = len(head) - len(head.translate(None, _CONTROL))
    if control < _FEWEST or control < _SHARE * len(head):
        return None
    if kind := sniff(head):
        return f"it is an image ({kind})"
    if head.count(0) > len(head) / 5:
        return "it holds NUL bytes throughout: UTF-16 or UTF-32 without a mark (iconv -f UTF-16 -t UTF-8), or no text"
    return "it is no text: its first bytes hold many control characters"


def clean(text: str) -> str:
    """The text with single spaces as its only white space and none at its ends; empty for a text with NUL in it, or in
    which no character shows. Control characters count as white space, and so do byte order marks, which joined files
    have inside. Half a surrogate pair, which JSON can write and UTF-8 cannot, becomes U+FFFD."""
    text = " ".join(text.split())
    if text.isprintable():
        return text if text.isascii() or not _INVISIBLE.fullmatch(text) else ""
    if "\0" in text or _INVISIBLE.fullmatch(text):
        return ""
    return " ".join(_UNUSABLE.sub(" ", _SURROGATE.sub("\ufffd", text)).split())


def why_nothing_left(text: str) -> str:
    """Why `clean` leaves nothing of a text, in words that follow a noun such as `lines`."""
    if "\0" in text:
        return "with NUL bytes in them, which is damage"
    return "that are blank" if not text.strip() else "in which no character shows, such as zero-width spaces"
