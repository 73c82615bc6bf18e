"""The prompts of a labelled set: every class name in every template."""

from __future__ import annotations

from collections.abc import Iterator

from cache_schemas.plan import SourceFile
from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.class_folders import folders_of_classes, names_of_folders
from dimefm.sources.files import stat_files
from dimefm.sources.text_lines import encoding_by_mark
from dimefm.system import storage

CLASSNAMES, TEMPLATES = "classnames.txt", "templates.txt"
CLIP_BENCHMARK_TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "a photo of a {c}."
NEEDED = f"give {CLASSNAMES}, one class name per line, or a folder of images for each class"


class PromptSet:
    """The prompts of a labelled set: a folder with classnames.txt and with templates.txt, where {c} is the class. Class
    folders stand for a missing classnames.txt, and DEFAULT_TEMPLATE for missing templates; the account then says so."""

    def __init__(self, root: str) -> None:
        self._root = storage.absolute(root)

    def files(self) -> list[SourceFile]:
        """classnames.txt, or the class folders, and templates.txt if there is one."""
        root, listed = self._root, listed_in(self._root)
        template_file = template_file_in(root, listed)
        classes = [storage.join(root, CLASSNAMES)] if CLASSNAMES in listed else [*folders_of_classes(root).values()]
        if not classes:
            raise no_classes(root)
        try:
            return stat_files([*classes, *([storage.join(root, template_file)] if template_file else [])])
        except AbsentError as error:  # deleted since
            raise SourceError(error.what, remedy=NEEDED) from None

    def samples(self, account: Account) -> Iterator[TextSample]:
        """The prompts of each class, in every template; the key is set/class/template, with numbers counted from 0."""
        name = self._root.rstrip("/").rpartition("/")[2]
        names, templates, notes = class_texts(self._root)
        for note in notes:
            account.problem(f"{self._root}: {note}")
        for class_id, class_name in enumerate(names):
            for template_id, template in enumerate(templates):
                yield TextSample(f"{name}/{class_id}/{template_id}", prompt(template, class_name))


def class_texts(root: str) -> tuple[list[str], list[str], list[str]]:
    """The class names and the templates of a labelled set, and a line for each of the two that is not in a file of its
    own and was made up. Raises SourceError for a set that has neither class names nor class folders."""
    notes, listed = [], listed_in(root)
    if CLASSNAMES in listed:
        names = read_classnames(root)
    else:
        folders = [*folders_of_classes(root)]
        if not folders:
            raise no_classes(root)
        names = names_of_folders(root, folders)
        such_as = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        notes.append(f"no {CLASSNAMES}: class names are those of the folders, with spaces for _ and - ({such_as})")
    if template_file := template_file_in(root, listed):
        return names, read_templates(root, template_file), notes
    return names, [DEFAULT_TEMPLATE], [*notes, f'no {TEMPLATES}: the only prompt is "{DEFAULT_TEMPLATE}"']


def listed_in(root: str) -> frozenset[str]:
    """What is in the folder of a labelled set, by one look: a mount that goes away between two would look like a set
    without templates."""
    return frozenset(storage.listing(root))


def no_classes(root: str) -> SourceError:
    """The error for a set with neither class names nor class folders."""
    return SourceError(f"{storage.join(root, CLASSNAMES)} does not exist", remedy=NEEDED)


def has_classnames(root: str) -> bool:
    """Whether a labelled set lists its class names."""
    return CLASSNAMES in listed_in(root)


def template_file_in(root: str, listed: frozenset[str]) -> str | None:
    """The name of the file that has the templates of a labelled set, its own or CLIP_benchmark's; None without one."""
    return next((name for name in (TEMPLATES, CLIP_BENCHMARK_TEMPLATES) if name in listed), None)


def prompt(template: str, class_name: str) -> str:
    """The template with `class_name` in place of {c}, or of {}, as open_clip and CLIP write it."""
    return " ".join(template.replace("{c}", class_name).replace("{}", class_name).split())


def read_classnames(root: str) -> list[str]:
    """Class names, one per line, in the order of the labels."""
    return read_entries(storage.join(root, CLASSNAMES))


def read_templates(root: str, name: str = TEMPLATES) -> list[str]:
    """Prompt templates, one per line. Raises SourceError where one has no place for the class."""
    return read_template_file(storage.join(root, name))


def read_template_file(path: str, needed: str = NEEDED) -> list[str]:
    """The templates in a file, as `read_templates`."""
    templates = read_entries(path, needed)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template and "{}" not in template:
            what = f"{path}, line {number}: {template!r} has no {{c}}"
            raise SourceError(what, remedy="put {c} where the class name goes")
    return templates


def read_entries(path: str, needed: str = NEEDED) -> list[str]:
    """The lines of a file without those that are blank at its end. Raises SourceError for another blank line, and with
    `needed` as its remedy where there is no such file."""
    try:
        data = storage.read_bytes(path)
        lines = data.decode(encoding_by_mark(data)).splitlines()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist", remedy=needed) from None
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
