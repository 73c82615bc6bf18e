"""The prompts of a labelled set: every class name in every template."""

from __future__ import annotations

from collections.abc import Iterator

from cache_schemas.plan import SourceFile
from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.files import stat_files
from dimefm.sources.text_lines import encoding_by_mark
from dimefm.system import storage

CLASSNAMES, TEMPLATES = "classnames.txt", "templates.txt"
_NEEDED = f"a labelled set needs {CLASSNAMES} and {TEMPLATES}"


class PromptSet:
    """The prompts of a labelled set: a folder with classnames.txt and with templates.txt, where {c} is the class."""

    def __init__(self, root: str) -> None:
        self._root = storage.absolute(root)

    def files(self) -> list[SourceFile]:
        """classnames.txt and templates.txt."""
        try:
            return stat_files([storage.join(self._root, name) for name in (CLASSNAMES, TEMPLATES)])
        except AbsentError as error:
            raise SourceError(error.what, remedy=f"{_NEEDED}; sentences are in files of other names") from None

    def samples(self, account: Account) -> Iterator[TextSample]:
        """The prompts of each class, in every template; the key is set/class/template, with numbers counted from 0."""
        name = self._root.rstrip("/").rpartition("/")[2]
        templates = read_templates(self._root)
        for class_id, class_name in enumerate(read_classnames(self._root)):
            for template_id, template in enumerate(templates):
                yield TextSample(f"{name}/{class_id}/{template_id}", prompt(template, class_name))


def prompt(template: str, class_name: str) -> str:
    """The template with `class_name` in place of {c}, or of {}, as open_clip and CLIP write it."""
    return " ".join(template.replace("{c}", class_name).replace("{}", class_name).split())


def read_classnames(root: str) -> list[str]:
    """Class names, one per line, in the order of the labels."""
    return _read_lines(storage.join(root, CLASSNAMES))


def read_templates(root: str, name: str = TEMPLATES) -> list[str]:
    """Prompt templates, one per line. Raises SourceError where one has no place for the class."""
    path = storage.join(root, name)
    templates = _read_lines(path)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template and "{}" not in template:
            what = f"{path}, line {number}: {template!r} has no {{c}}"
            raise SourceError(what, remedy="put {c} where the class name goes")
    return templates


def _read_lines(path: str) -> list[str]:
    """The lines of a file without those that are blank at its end. Raises SourceError for another blank line."""
    try:
        data = storage.read_bytes(path)
        lines = data.decode(encoding_by_mark(data)).splitlines()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist", remedy=_NEEDED) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}", remedy="write it again as UTF-8 (iconv does)") from None
    found = [line.strip() for line in lines]
    while found and not found[-1]:
        found.pop()
    if not found:
        raise SourceError(f"{path} is empty", remedy="write one entry per line")
    if "" in found:
        what = f"{path}, line {found.index('') + 1} is blank"
        raise SourceError(what, remedy="delete it: lines are counted, and those after it would shift")
    return found
