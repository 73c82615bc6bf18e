"""Sentences from text files, tables, tars and labelled sets: what the arguments of cache-texts name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import Joined, Source, TextSample
from dimefm.sources.class_folders import is_image_folder
from dimefm.sources.file_names import why_not_read
from dimefm.sources.files import expand, is_glob
from dimefm.sources.json_fields import NoColumnError
from dimefm.sources.json_texts import JsonArray
from dimefm.sources.parquet_texts import ParquetTexts
from dimefm.sources.prompts import CLASSNAMES, TEMPLATES, PromptSet
from dimefm.sources.tar_texts import TarTexts
from dimefm.sources.text_lines import clean, encoding_of, open_text, reporting, why_nothing_left
from dimefm.sources.text_tables import Delimited, JsonLines, Table
from dimefm.sources.walk_folder import files_below, files_in
from dimefm.system import storage
from dimefm.system.inert_text import line


class TextFile:
    """A .txt or .txt.gz file with a sentence per line, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. The key
    of a sentence is file:line."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._path = file, file.path

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every line in which a character shows; others are counted. Bytes that are not UTF-8 become U+FFFD, which is
        reported once per file. So are a file that is not text, and one that is likely a table."""
        name = self._path.rpartition("/")[2]
        number = tabs = 0
        with reporting(self._path, "line", account) as reading, open_text(self._path) as file:
            reading.encoding = encoding_of(file)
            for number, line in enumerate(file, 1):
                reading.place = number
                if "\t" in line and "\t" in line.strip():
                    tabs += 1
                if text := clean(line):
                    if "\ufffd" in text:
                        reading.replaced += 1
                    yield TextSample(f"{name}:{number}", text)
                else:
                    account.skip(f"lines {why_nothing_left(line)}", f"{self._path}:{number}")
        if tabs > number / 2:
            what = f"{tabs} of {number} lines hold tabs, which become spaces; if it is a table, rename it to .tsv"
            account.problem(f"{self._path}: {what}, and name its column with --column")


class _FoundTable:
    """A table that was found in a folder or by a glob: it is counted, not refused, if it lacks the column."""

    def __init__(self, table: Source[TextSample], column: str | None) -> None:
        self._table, self._column = table, column

    def files(self) -> list[SourceFile]:
        """The one file."""
        return self._table.files()

    def samples(self, account: Account) -> Iterator[TextSample]:
        """The samples of the table; none where it lacks the column."""
        try:
            yield from self._table.samples(account)
        except NoColumnError as error:
            reason = "tables without a column of sentences (name one with --column)"
            account.skip(f"tables without a column {self._column!r}" if self._column else reason, error.example)


_KINDS = {
    ".txt": TextFile,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonArray,
    ".csv": Delimited,
    ".tsv": Delimited,
    ".parquet": ParquetTexts,
    ".tar": TarTexts,
}
_NEVER_GZ = (".parquet", ".tar")
_BESIDE = (".json", ".tar")
"""Kinds that are not read in a folder that holds other kinds too; of just these two, tars are read. Beside other kinds,
.json files describe the dataset, and tars hold the images, with captions that the tables have too."""


def open_text_source(
    arguments: Sequence[str | Source[TextSample]], column: str | None = None, account: Account | None = None
) -> Source[TextSample]:
    """The source that the arguments name: text files, tables and tars, also by globs and ranges such as {000..009},
    folders of these, or folders of a labelled set, which stand for its prompts. From Python, an argument may also be a
    Source, which is taken as it is.

    Text files are .txt; tables are .jsonl, .ndjson, .json, .csv, .tsv and .parquet; all but .parquet may end in .gz.
    In a .tar the .txt members are read, or with `column` a field of the .json members. The files of a folder, at any
    depth, must be of one kind; .json and .tar files beside them are not read. What else is in a folder, or matches a
    glob and is not used, is counted in `account`. `column` is the column or field of tables, by default the first of
    text, caption, sentence, TEXT and title; a number means a column of a .csv or .tsv without a header.

    Raises SourceError where an argument does not exist, holds no sentences or is of another kind, and where the first
    table does not have the column. Later tables are opened when their turn comes; a table that was found in a folder or
    by a glob is counted then if it lacks the column.
    """
    account = Account() if account is None else account
    parts: list[Source[TextSample]] = []
    for argument in arguments:
        if not isinstance(argument, str):
            parts.append(argument)
            continue
        places = expand(argument, account)
        files = [place.file for place in places if place.file]
        if is_glob(argument, places):
            files = _of_known_kind(files, account)
        found = [_open_file(file, column, found=is_glob(argument, places)) for file in files]
        for place in places:
            if place.file is None:
                found += _open_folder(argument, place.path, column, account)
        if not found:
            what = f"{argument} holds no {', '.join(_KINDS)} file{found_instead(account.lines())}"
            raise SourceError(what, remedy="give files with a sentence per line, or tables with a column of sentences")
        parts += found
    if column is not None and all(isinstance(part, TextFile | PromptSet) for part in parts):
        what = f"--column {column}: the sentences are in no table, and only tables have columns"
        raise SourceError(what, remedy=f"leave it out; tables are {', '.join([*_KINDS][1:])}")
    tables = [part for part in parts if isinstance(part, (Table, ParquetTexts))]
    if tables:
        tables[0].check()
    return Joined(parts)


def _open_file(file: SourceFile, column: str | None, *, found: bool) -> Source[TextSample]:
    kind = _kind(file.path)
    if kind is None:
        kinds = ", ".join(_KINDS)
        what = f"{line(file.path)} is neither a {kinds} nor a folder, but one of the {why_not_read(file.path)}"
        raise SourceError(what, remedy="give text files or tables; all but .parquet and .tar may be .gz")
    if kind == ".txt":
        return TextFile(file)
    table = _KINDS[kind](file, column)
    return _FoundTable(table, column) if found else table


def _open_folder(argument: str, path: str, column: str | None, account: Account) -> list[Source[TextSample]]:
    """The sources in a folder at `path`, which `argument` names in the user's words. Raises SourceError where it holds
    files of several kinds."""
    if storage.exists(storage.join(path, CLASSNAMES)):
        for file in files_in(path, lambda name: name not in (CLASSNAMES, TEMPLATES), account):
            account.skip("files of a labelled set beside its class names and templates", file.path)
        return [PromptSet(path)]
    kinds: dict[str | None, list[SourceFile]] = {}
    below = files_below(path, account)
    sentences = [file for file in below if _kind(file.path) and file.path != storage.join(path, TEMPLATES)]
    if not sentences and is_image_folder(path, below):
        return [PromptSet(path)]
    for file in _of_known_kind(below, account):
        kinds.setdefault(_kind(file.path), []).append(file)
    for kind in _BESIDE:
        for file in kinds.pop(kind, ()) if len(kinds) > 1 else ():
            account.skip(f"{kind} files beside others with sentences (name them to use them)", file.path)
    if len(kinds) > 1:
        what = " and ".join(f"{len(kinds[kind]):,} {kind}" for kind in _KINDS if kind in kinds)
        each = [f"'{storage.join(argument, f'**/*{kind}')}'" for kind in _KINDS if kind in kinds]
        raise SourceError(f"{argument} holds {what} files", remedy=f"name those you mean: {' or '.join(each)}")
    return [_open_file(file, column, found=True) for files in kinds.values() for file in files]


def _of_known_kind(files: list[SourceFile], account: Account) -> list[SourceFile]:
    """The files of one of _KINDS; the others are counted."""
    for file in files:
        if _kind(file.path) is None:
            account.skip(why_not_read(file.path), file.path)
    return [file for file in files if _kind(file.path) is not None]


def _kind(path: str) -> str | None:
    """Which of _KINDS a file is, by its name without .gz; None for another."""
    name = path.lower().removesuffix(".gz")
    kinds = [kind for kind in _KINDS if name == path.lower() or kind not in _NEVER_GZ]
    return next((kind for kind in kinds if name.endswith(kind)), None)
