"""Images as base64 in tables: KEY, tab, BASE64, a line each, as vision-language codebases keep them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.images.decode import MAX_BYTES, sniff
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample
from dimefm.sources.files import open_seekable
from dimefm.sources.forward_reader import Window, open_window
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage

SUFFIX, INDEX_SUFFIX = ".tsv", ".lineidx"
_HEAD = 512  # bytes of a line that are looked at first
_FIRST_LINES, _LONGEST_WORD = 8, 200  # what is looked at of a file that may hold no images
_PIECE = 1 << 20  # of the last line, which is read to its end
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*={0,2}")

_Line = tuple[int, int, Callable[[int], bytes]]
"""Where a line begins, its size without the line end, and a function for its first n bytes."""


class TsvImages:
    """Tables of KEY, tab, base64 of an image, a line each; with more columns the image is in the last.

    All lines have as many columns as the first. Where a NAME.lineidx with the offset of every line lies beside
    NAME.tsv only the beginnings of lines are read, else all of the file; the samples are the same. Files that were
    `found`, in a folder, may hold something else, and are counted then.
    """

    def __init__(self, files: Sequence[SourceFile], *, found: bool = False) -> None:
        self._files, self._found = files, found

    def files(self) -> list[SourceFile]:
        """The .tsv files, as given; a .lineidx only says where their lines are."""
        return list(self._files)

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by file and line; blank lines, and lines with too few columns, are counted.

        Raises SourceError for a file that holds no images, and for a .lineidx that does not fit.
        """
        for file in self._files:
            try:
                if self._found and not _may_hold_images(file):
                    account.skip("tables (.tsv) whose first lines hold no image", file.path)
                    continue
                yield from _in_file(file, account)
            except OSError as error:
                raise cannot_read(file.path, error) from error


def _may_hold_images(file: SourceFile) -> bool:
    """Whether one of the first lines ends in base64 of an image, or in so much base64 that it is no word."""
    for line in storage.read_bytes(file.path, 0, _PIECE).split(b"\n")[:_FIRST_LINES]:
        text = _without_end(line).rpartition(b"\t")[2]
        if b"\t" in line and _BASE64.fullmatch(text):
            image = sniff(base64.b64decode(text[: min(len(text), 64) // 4 * 4].rstrip(b"=") + b"=="))
            if image or len(text) > _LONGEST_WORD:
                return True
    return False


def _in_file(file: SourceFile, account: Account) -> Iterator[ImageSample]:
    name = file.path.rpartition("/")[2]
    index = file.path.removesuffix(SUFFIX) + INDEX_SUFFIX
    tabs = 0
    for number, (offset, size, head) in enumerate(_by_index(file, index) or _by_newline(file.path), 1):
        if not size:
            account.skip("blank lines of .tsv files", f"{file.path}:{number}")
            continue
        if size > MAX_BYTES:
            what = f"{file.path}, line {number} is longer than {MAX_BYTES:,} bytes: no image is"
            raise SourceError(what, remedy="lines of a .tsv of images are KEY, tab, BASE64; name the files that are")
        tabs = tabs or _tabs_of_first(f"{file.path}, line {number}", head(size))
        text = head(_HEAD)
        while (place := _place_of_tab(text, tabs)) < 0 and len(text) < size:
            text = head(2 * len(text))
        if place < 0:
            account.skip("lines of .tsv files with fewer columns than the first", f"{file.path}:{number}")
            continue
        key = text[: text.index(b"\t")].decode("utf-8", "backslashreplace").removeprefix("\ufeff").strip()
        yield ImageSample(key or f"{name}:{number}", file.path, offset + place + 1, size - place - 1)


def _tabs_of_first(where: str, line: bytes) -> int:
    _, tab, text = line.rpartition(b"\t")
    if not tab or not _BASE64.fullmatch(text):
        what = f"{where}: the last column is not base64" if tab else f"{where} has no tab"
        raise SourceError(what, remedy="lines of a .tsv of images are KEY, tab, BASE64; name the files that are")
    return line.count(b"\t")


def _place_of_tab(text: bytes, number: int) -> int:
    """Where the tab of that number is, counted from 1; -1 where there are fewer."""
    place = -1
    for _ in range(number):
        if (place := text.find(b"\t", place + 1)) < 0:
            break
    return place


def _by_newline(path: str) -> Iterator[_Line]:
    offset = 0
    with open_seekable(path) as stream:
        while line := stream.readline(MAX_BYTES + 2):  # one too long is not read to its end, wherever that is
            text = _without_end(line)
            yield offset, len(text), partial(_of_line, text)
            offset += len(line)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _of_line(text: bytes, number: int) -> bytes:
    return text[:number]


def _by_index(file: SourceFile, index: str) -> Iterator[_Line] | None:
    """The lines whose offsets are in `index`; None where there is no such file."""
    try:
        words = storage.read_bytes(index).split()
    except FileNotFoundError:
        return None
    try:
        offsets = np.array(words, np.int64)
    except (ValueError, OverflowError):
        raise _misfit(file, index, "it holds something else than offsets") from None
    if not (len(offsets) and offsets[0] == 0 and (np.diff(offsets) > 0).all()):
        raise _misfit(file, index, "its offsets do not ascend from 0")
    if offsets[-1] >= file.size:
        raise _misfit(file, index, f"it goes on to {offsets[-1]:,}, and the file ends at {file.size:,}")
    return _at_offsets(file, index, [*offsets.tolist(), file.size])


def _at_offsets(file: SourceFile, index: str, offsets: list[int]) -> Iterator[_Line]:
    with open_window(file.path) as window:
        begins = window.get(0, _HEAD)
        for number, stop in enumerate(offsets[1:], 1):
            start, first = offsets[number - 1], begins
            # The end of this line and the beginning of the next are one read.
            around = window.get(stop - 2, 2 + _HEAD) if stop > 1 else b"\n" + window.get(0, 1 + _HEAD)
            ending, begins = around[:2], around[2:]
            if number < len(offsets) - 1 and ending[1:] != b"\n":
                raise _misfit(file, index, f"line {number + 1} does not begin after a newline")
            size = max(0, stop - start - len(ending) + len(_without_end(ending)))
            if number == len(offsets) - 1 and _has_newline(window, start, start + size):
                raise _misfit(file, index, f"there are more lines than the {number:,} in it")
            yield start, size, partial(_first_bytes, window, start, size, first)


def _first_bytes(window: Window, start: int, size: int, known: bytes, number: int) -> bytes:
    number = min(number, size)
    return known[:number] if number <= len(known) else window.get(start, number)


def _has_newline(window: Window, start: int, stop: int) -> bool:
    return any(b"\n" in window.get(at, min(_PIECE, stop - at)) for at in range(start, stop, _PIECE))


def _misfit(file: SourceFile, index: str, why: str) -> SourceError:
    remedy = "delete it, and lines are found by reading the .tsv; or make it again"
    return SourceError(f"{index} does not fit {file.path}: {why}", remedy=remedy)
