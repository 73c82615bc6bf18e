"""Images as base64 in tables, KEY, tab, BASE64 in each line, as vision-language codebases keep them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.images.decode import MAX_BYTES, sniff
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample
from dimefm.sources.caption_reader import CaptionReader
from dimefm.sources.files import open_seekable
from dimefm.sources.forward_reader import Window, open_window
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage

SUFFIX, INDEX_SUFFIX = ".tsv", ".lineidx"
_HEAD = 512  # bytes of a line that are read first
_FIRST_LINES, _LONGEST_WORD = 8, 200  # of a file that may hold no images
_PIECE = 1 << 20  # bytes read at a time to see that the last line holds no newline
_REMEDY = "lines of a .tsv of images are KEY, tab, BASE64; name the files that are"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*={0,2}")

_Line = tuple[int, int, Callable[[int], bytes]]
"""The offset of a line, its size without the line end, and a function that gives its first n bytes."""


class TsvImages:
    """Tables with a line per image: KEY, tab and the image in base64. With more columns, the image is in the last.

    All lines have as many columns as the first. Where NAME.lineidx, with the offset of every line, lies beside
    NAME.tsv, only the beginnings of lines are read, else the whole file; the samples are the same. Files that were
    `found` in a folder may hold something else, and are counted then. `captions` is the number of the column that holds
    the image's caption, counted from 0: these tables have no names of columns.
    """

    def __init__(self, files: Sequence[SourceFile], captions: str | None = None, *, found: bool = False) -> None:
        self._files, self._captions, self._found = files, captions, found

    def files(self) -> list[SourceFile]:
        """The .tsv files, as given, without their .lineidx files."""
        return list(self._files)

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by file and line; blank lines, and lines with too few columns, are counted.

        Raises SourceError for a file that holds no images, for a .lineidx that does not fit, and for a column of
        captions that the table does not have.
        """
        for file in self._files:
            try:
                if self._found and not _may_hold_images(file):
                    account.skip("tables (.tsv) whose first lines hold no image", file.path)
                    continue
                yield from _images(file, account, self._caption_column(file))
            except OSError as error:
                raise cannot_read(file.path, error) from error

    def _caption_column(self, file: SourceFile) -> int | None:
        """The number of the column of captions; None where there is none, as in a table that was found in a folder
        whose captions have a name."""
        if self._captions is None or self._captions.isdecimal():
            return None if self._captions is None else int(self._captions)
        if self._found:
            return None
        what = f"{file.path} has no column {self._captions!r}: the columns of a .tsv of images have no names"
        raise SourceError(what, remedy="give the number of the column with --captions, counted from 0")


def _may_hold_images(file: SourceFile) -> bool:
    """Whether one of the first lines ends in the base64 of an image, or in base64 that is too long to be a word."""
    for line in storage.read_bytes(file.path, 0, _PIECE).split(b"\n")[:_FIRST_LINES]:
        text = _without_end(line).rpartition(b"\t")[2]
        if b"\t" in line and _BASE64.fullmatch(text):
            image = sniff(base64.b64decode(text[: min(len(text), 64) // 4 * 4].rstrip(b"=") + b"=="))
            if image or len(text) > _LONGEST_WORD:
                return True
    return False


def _images(file: SourceFile, account: Account, caption_column: int | None) -> Iterator[ImageSample]:
    """The images of a table, each after as many tabs as its first line has."""
    reader = CaptionReader(file.path, account)
    name = file.path.rpartition("/")[2]
    index = file.path.removesuffix(SUFFIX) + INDEX_SUFFIX
    tabs = 0  # of each line, known from the first on
    for number, (offset, size, first_bytes) in enumerate(_lines_by_index(file, index) or _lines(file.path), 1):
        if not size:
            account.skip("blank lines of .tsv files", f"{file.path}:{number}")
            continue
        if size > MAX_BYTES:
            what = f"{file.path}, line {number} is longer than {MAX_BYTES:,} bytes: no image is"
            raise SourceError(what, remedy=_REMEDY)
        tabs = tabs or _count_tabs(f"{file.path}, line {number}", first_bytes(size))
        text = first_bytes(_HEAD)
        while (last_tab := _find_tab(text, tabs)) < 0 and len(text) < size:
            text = first_bytes(2 * len(text))
        if last_tab < 0:
            account.skip("lines of .tsv files with fewer columns than the first", f"{file.path}:{number}")
            continue
        key = text[: text.index(b"\t")].decode("utf-8", "backslashreplace").removeprefix("\ufeff").strip()
        start = last_tab + 1
        captions: tuple[str, ...] = ()
        if caption_column is not None:
            captions = reader.of_values([_cell(file, text[:last_tab], caption_column)], f"{file.path}:{number}")
        yield ImageSample(key or f"{name}:{number}", file.path, offset + start, size - start, captions)
    reader.finish()


def _cell(file: SourceFile, text: bytes, column: int) -> str:
    """A column of a line whose image was cut off. Raises SourceError where there is no such column."""
    cells = text.split(b"\t")
    if column >= len(cells):
        what = f"{file.path} has no column {column} before the image, which is in column {len(cells)}"
        raise SourceError(what, remedy=f"give --captions a number from 0 to {len(cells) - 1}")
    return cells[column].decode("utf-8", "replace")


def _count_tabs(where: str, line: bytes) -> int:
    """The tabs of the first line. Raises SourceError where its last column is not base64."""
    _, tab, text = line.rpartition(b"\t")
    if not tab or not _BASE64.fullmatch(text):
        what = f"{where}: the last column is not base64" if tab else f"{where} has no tab"
        raise SourceError(what, remedy=_REMEDY)
    return line.count(b"\t")


def _find_tab(text: bytes, number: int) -> int:
    """The place of the tab of this number, counted from 1; -1 where there are fewer tabs."""
    place = -1
    for _ in range(number):
        if (place := text.find(b"\t", place + 1)) < 0:
            break
    return place


def _lines(path: str) -> Iterator[_Line]:
    """The lines of a file, found by reading it."""
    offset = 0
    with open_seekable(path) as stream:
        while line := stream.readline(MAX_BYTES + 2):  # a line that is too long is not read to its end
            text = _without_end(line)
            yield offset, len(text), lambda number, text=text: text[:number]  # type: ignore[misc]
            offset += len(line)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _lines_by_index(file: SourceFile, index: str) -> Iterator[_Line] | None:
    """The lines of a file, found by the offsets in the file `index`; None where there is no such file."""
    try:
        words = storage.read_bytes(index).split()
    except FileNotFoundError:
        return None
    try:
        offsets = np.array(words, np.int64)
    except (ValueError, OverflowError):
        raise _index_misfit(file, index, "it holds something other than offsets") from None
    if not (len(offsets) and offsets[0] == 0 and (np.diff(offsets) > 0).all()):
        raise _index_misfit(file, index, "its offsets do not ascend from 0")
    if offsets[-1] >= file.size:
        raise _index_misfit(file, index, f"it goes on to {offsets[-1]:,}, and the file ends at {file.size:,}")
    return _lines_at(file, index, [*offsets.tolist(), file.size])


def _lines_at(file: SourceFile, index: str, offsets: list[int]) -> Iterator[_Line]:
    """The lines between these offsets, the last of which is the file's end. Raises SourceError where one does not begin
    after a newline, or the last holds a newline."""
    with open_window(file.path) as window:
        next_beginning = window.get(0, _HEAD)
        for number, (start, stop) in enumerate(pairwise(offsets), 1):
            beginning, is_last = next_beginning, number == len(offsets) - 1
            # The end of this line and the beginning of the next are one read.
            around = window.get(stop - 2, 2 + _HEAD) if stop > 1 else b"\n" + window.get(0, 1 + _HEAD)
            ending, next_beginning = around[:2], around[2:]
            if not is_last and ending[1:] != b"\n":
                raise _index_misfit(file, index, f"line {number + 1} does not begin after a newline")
            size = max(0, stop - start - len(ending) + len(_without_end(ending)))
            if is_last and _has_newline(window, start, start + size):
                raise _index_misfit(file, index, f"there are more lines than the {number:,} in it")
            yield start, size, partial(_first_bytes, window, start, size, beginning)


def _first_bytes(window: Window, start: int, size: int, known: bytes, number: int) -> bytes:
    """The first `number` bytes of a line, of which those in `known` were read already."""
    number = min(number, size)
    return known[:number] if number <= len(known) else window.get(start, number)


def _has_newline(window: Window, start: int, stop: int) -> bool:
    return any(b"\n" in window.get(at, min(_PIECE, stop - at)) for at in range(start, stop, _PIECE))


def _index_misfit(file: SourceFile, index: str, why: str) -> SourceError:
    remedy = "delete it, so that lines are found by reading the .tsv, or make it again"
    return SourceError(f"{index} does not fit {file.path}: {why}", remedy=remedy)
