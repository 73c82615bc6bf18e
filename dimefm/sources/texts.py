"""Sentences from text files, and the prompts of a labelled set."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator

from dimefm import storage
from dimefm.errors import SourceError
from dimefm.sources.base import Joined, Source, SourceFile, TextSample
from dimefm.sources.files import Place, children, expand, open_forward, stat_files

CLASSNAMES, TEMPLATES = "classnames.txt", "templates.txt"


class TextFile:
    """A .txt or .txt.gz file in UTF-8, one sentence a line. The key of a sentence is file:line."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._path = file, file.path

    def files(self) -> list[SourceFile]:
        """The one file."""
        return [self._file]

    def samples(self, report: Callable[[str], None]) -> Iterator[TextSample]:
        """Every line that is not blank. Bytes that are not UTF-8 become U+FFFD, and the file is reported once."""
        name = self._path.rpartition("/")[2]
        broken = 0
        number = 0
        try:
            with open_forward(self._path) as file:
                for number, raw in enumerate(file, 1):
                    line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8", errors="replace")
                    broken += "�" in line
                    text = " ".join(line.split())
                    if text:
                        yield TextSample(f"{name}:{number}", text)
        except (EOFError, zlib.error, OSError) as error:
            report(f"{self._path}: broken after line {number} ({error}); what follows is lost")
        if broken:
            report(f"{self._path}: {broken} lines are not UTF-8; the bad bytes were replaced")


class PromptSet:
    """The prompts of a labelled set: a folder with classnames.txt and templates.txt ({c} stands for the class)."""

    def __init__(self, root: str) -> None:
        self._root = storage.absolute(root)

    def files(self) -> list[SourceFile]:
        """classnames.txt and templates.txt."""
        return stat_files([storage.join(self._root, name) for name in (CLASSNAMES, TEMPLATES)])

    def samples(self, report: Callable[[str], None]) -> Iterator[TextSample]:
        """Every class under every template; the key is set/class/template."""
        name = self._root.rstrip("/").rpartition("/")[2]
        templates = read_templates(self._root)
        for class_id, class_name in enumerate(read_classnames(self._root)):
            for template_id, template in enumerate(templates):
                yield TextSample(f"{name}/{class_id}/{template_id}", prompt(template, class_name))


def prompt(template: str, class_name: str) -> str:
    """`class_name` put in place of {c}, or of {} as open_clip and CLIP write it."""
    return " ".join(template.replace("{c}", class_name).replace("{}", class_name).split())


def read_classnames(root: str) -> list[str]:
    """Class names, one a line, in the order of the labels."""
    return _lines(storage.join(root, CLASSNAMES))


def read_templates(root: str) -> list[str]:
    """Prompt templates, one a line. Raises SourceError where one has no place for the class."""
    path = storage.join(root, TEMPLATES)
    templates = _lines(path)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template and "{}" not in template:
            what = f"{path}, line {number}: {template!r} has no {{c}}"
            raise SourceError(what, remedy="put {c} where the class name goes")
    return templates


def _lines(path: str) -> list[str]:
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        remedy = f"a labelled set needs {CLASSNAMES} and {TEMPLATES}"
        raise SourceError(f"{path} does not exist", remedy=remedy) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}") from None
    found = [line.strip() for line in lines]
    while found and not found[-1]:
        found.pop()
    if not found:
        raise SourceError(f"{path} is empty", remedy="write one entry a line")
    if "" in found:
        what = f"{path}, line {found.index('') + 1} is blank"
        raise SourceError(what, remedy="delete it: lines are counted, and those after it would shift")
    return found


def open_text_source(arguments: list[str], column: str | None = None) -> Source[TextSample]:
    """The source that the arguments name: .txt and .txt.gz files, folders of them, or folders of a labelled set.

    Raises SourceError where one does not exist or is of another kind.
    """
    parts: list[Source[TextSample]] = []
    for argument in arguments:
        for place in expand(argument):
            parts.extend(_open(argument, place))
    return Joined(parts)


def _open(argument: str, place: Place) -> list[Source[TextSample]]:
    if place.file:
        if not _is_text(place.path):
            what = f"{argument}: {place.path} is neither .txt, .txt.gz nor a folder"
            raise SourceError(what, remedy="give text files")
        return [TextFile(place.file)]
    if storage.exists(storage.join(place.path, CLASSNAMES)):
        return [PromptSet(place.path)]
    found = children(place.path, _is_text)
    if not found:
        raise SourceError(f"{argument} holds no .txt or .txt.gz file", remedy="give files with one sentence a line")
    return [TextFile(file) for file in found]


def _is_text(name: str) -> bool:
    return name.endswith((".txt", ".txt.gz"))
