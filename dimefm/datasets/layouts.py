"""How sets are kept on disk: WebDataset tars, Parquet, and class folders; each reader gives what it finds as Records.

    SET/test/0.tar            as CLIP_benchmark publishes them, or SET/test-00000.tar, or SET/*.tar: key.jpg beside
                              key.cls (a label), key.npy (0 or 1 for every class) or key.txt (a caption a line)
    SET/test/*.parquet        or SET/test-*.parquet, SET/data/test-*.parquet, SET/*.parquet: a column of images and one
                              of labels or captions
    SET/test/CLASS/*.jpg      or SET/CLASS/*.jpg

A folder without splits is the test split.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas.evaluation import SetDefinition
from cache_schemas.plan import SourceFile
from dimefm.datasets.definitions import class_folders, class_names
from dimefm.datasets.image_set import Records, parse_label
from dimefm.datasets.unused_files import CLIP_BENCHMARK_TEMPLATES, SPLIT_FOLDERS, class_folders_in, count_unused
from dimefm.errors import SourceError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import ImageSample, file_key, split_key
from dimefm.sources.file_names import HIDDEN_MEMBERS, is_hidden_member
from dimefm.sources.image_kinds import IMAGE_EXTENSIONS, why_no_image
from dimefm.sources.image_sources import ImageFolder
from dimefm.sources.parquet import DamagedParquetError, hugging_face_features, open_parquet, read_blocks
from dimefm.sources.parquet_images import ParquetImages, image_column
from dimefm.sources.prompts import CLASSNAMES, TEMPLATES, read_classnames, read_templates
from dimefm.sources.tar import TarMember, tar_members
from dimefm.sources.walk_folder import cannot_read, files_in
from dimefm.system import storage
from dimefm.system.read_ahead import in_order

Reader = Callable[[str, str, SetDefinition | None], Records | None]
"""From a folder and a split to what is there, or None where the folder does not have this layout."""

_IMAGES = ("objectnet-1.0/images",)  # where a set without splits has its class folders, if not in its own
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
_BARE, _WRITE_LABELS = (
    "{} has no .cls, .npy or .txt",
    "write its label, an integer, into KEY.cls, or captions into KEY.txt",
)
_SAID = ("cls", "npy", "txt")
_CAPTIONS = ("caption", "captions", "text", "texts", "sentences", "raw", "txt")


class UnlabelledError(SourceError):
    """Tars or tables that say nothing of any image: they may lie beside the set, which is kept in another layout."""


def read_first(
    readers: Iterable[tuple[str, Reader]], folder: str, split: str, definition: SetDefinition | None
) -> tuple[str, Records] | None:
    """What the first reader gives that finds its layout in the folder, and the layout's name. Tars and tables without
    labels are passed over, and noted, where there is another layout; else they are a SourceError."""
    unlabelled: UnlabelledError | None = None
    for layout, reader in readers:
        try:
            records = reader(folder, split, definition)
        except UnlabelledError as error:
            unlabelled = unlabelled or error
            continue
        except SourceError:
            if unlabelled:
                raise unlabelled from None
            raise
        if records is not None:
            if unlabelled:
                records.account.problem(f"not used: {unlabelled.what}")
            return layout, records
    if unlabelled:
        raise unlabelled
    return None


def split_folder_names(split: str, definition: SetDefinition | None) -> tuple[str, ...]:
    """What its folder may be called. Where a set has no split for validation, what is called so is the test split; of
    ImageNet first of all, whose own test images have no labels."""
    if split != "test" or (definition is not None and "val" in definition.splits):
        return SPLIT_FOLDERS[split]
    if definition is not None and definition.suite == "imagenet":
        return SPLIT_FOLDERS["val"] + SPLIT_FOLDERS["test"]
    return SPLIT_FOLDERS["test"] + SPLIT_FOLDERS["val"]


def read_webdataset(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """Tars with labels or captions beside the images."""
    tars = _files(folder, split, ".tar", definition)
    if not tars:
        return None
    records = _with_texts(Records(where=folder, layout="webdataset", samples=[], files=tars), folder)
    classes = len(records.classnames) if records.classnames else definition.class_count if definition else None
    labels: list[Any] = []
    for tar in sorted(tars, key=lambda file: natural_order(file.path)):
        images, said = _members(tar.path, records.account)
        if images and not images.keys() & said.keys():
            raise UnlabelledError(f"{tar.path}: {_BARE.format(next(iter(images)))}", remedy=_WRITE_LABELS)
        _require_pairs(tar.path, images, said)
        wanted = [(key, tar.path, classes, *said[key]) for key in images]
        read = in_order(_read_said, wanted) if storage.is_url(tar.path) else map(_read_said, wanted)
        labels += read
        records.samples += [ImageSample(key, tar.path, m.offset, m.size) for key, m in images.items()]
    count_unused(records, folder, tars[0].path.rpartition("/")[0], split, own=definition is None)
    captions = {isinstance(one, tuple) for one in labels}
    if len(captions) > 1:
        raise SourceError(f"{folder} has labels for some images and captions for others", remedy="part them")
    if captions == {True}:
        records.captions = [list(one) for one in labels]
    else:
        records.labels = labels
    return records


def read_parquet(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """Parquet files with a column of images and one of labels (numbers, names, or lists of numbers) or captions."""
    files = _files(folder, split, ".parquet", definition)
    if not files:
        return None
    files.sort(key=lambda file: natural_order(file.path))
    with _damage_named(files[0].path):
        column, names = _said_column(files[0].path, definition)
    said = [value for file in files for value in _values(file.path, column)]
    records = Records(where=folder, layout="parquet", samples=[], files=files, names=names)
    account = records.account
    samples = records.samples = list(ParquetImages(files).samples(account))
    if account.problems:
        raise SourceError(account.problems[0], remedy="fetch the file again")
    several = any(sample.file.endswith("]") and not sample.file.endswith("[0]") for sample in samples)
    if several or len(samples) != len(said):
        what = f"{folder} has {len(said):,} rows and {len(samples):,} images{found_instead(account.lines())}"
        raise SourceError(what, remedy="write one image a row")
    count_unused(records, folder, files[0].path.rpartition("/")[0], split, own=definition is None)
    if column in _CAPTIONS:
        records.captions = [_texts(one, f"{folder}: column {column!r}") for one in said]
    else:
        _with_labels(records, said, column)
    return _with_texts(records, folder)


def read_folders(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """One folder of images for each class. A folder that is no class of the set is an error; where all classes are
    there (ObjectNet has 313, of which 113 are scored), more of them are left out, and said so."""
    if storage.is_url(folder):
        return None
    base = next((f"{folder}/{n}" for n in split_folder_names(split, definition) if Path(folder, n).is_dir()), None)
    other = any(Path(folder, n).is_dir() for names in SPLIT_FOLDERS.values() for n in names)
    if base is None and (split != "test" or other):
        return None
    base = base or next((f"{folder}/{n}" for n in _IMAGES if Path(folder, n).is_dir()), folder)
    account = Account()
    found = class_folders_in(base, account)
    place_of, classes = _places(folder, definition)
    places = {name: place for name in found if (place := place_of(name)) is not None}
    if not places and all(name.isdigit() for name in found):
        places = {name: int(name) for name in found}
    if not found or (definition is not None and not places):
        return None
    strange = [name for name in found if name not in places]
    if strange and definition is not None and len(found) - len(strange) == classes:
        account.skip("folders that are no class of the set", strange[0], len(strange))
    elif strange:
        remedy = "name each folder as its line in classnames.txt" if definition is None else "see dimefm sets NAME"
        what = f"{base}/{strange[0]} is not a class of {CLASSNAMES if definition is None else definition.title}"
        raise SourceError(what, remedy=remedy)
    records = Records(where=base, layout="folders", samples=[], files=[], labels=[], account=account)
    labels: list[int] = []
    for name in (name for name in found if name in places):
        if (namesake := next(other for other in places if places[other] == places[name])) != name:
            account.problem(f"the folders {namesake} and {name} of {base} are taken for the same class")
        files = ImageFolder(storage.join(base, name), account).files()
        records.files += files
        records.samples += [ImageSample(file_key(file.path, base), file.path, 0, file.size) for file in files]
        labels += [places[name]] * len(files)
    records.labels = labels
    count_unused(records, folder, base, split, own=definition is None)
    if definition is not None:
        records.names = class_names(definition)
    return _with_texts(records, folder)


def letters_and_digits(name: str) -> str:
    """A name by its letters and digits alone: ``F/A-18`` and ``fa_18`` are the same."""
    return "".join(c for c in name.casefold() if c.isalnum()) or name


def name_lookup(spelled: Iterable[tuple[int, str]]) -> Callable[[str], int | None]:
    """What gives the place of a name, by its very spelling or else as `plain`; None where it has none, or several."""
    exact: dict[str, set[int]] = {}
    loose: dict[str, set[int]] = {}
    for place, name in spelled:
        exact.setdefault(name, set()).add(place)
        loose.setdefault(letters_and_digits(name), set()).add(place)

    def place_of(name: str) -> int | None:
        found = exact.get(name) or loose.get(letters_and_digits(name)) or set()
        return next(iter(found)) if len(found) == 1 else None

    return place_of


def natural_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts 2.tar before 10.tar."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path)]


def _files(folder: str, split: str, suffix: str, definition: SetDefinition | None) -> list[SourceFile]:
    """The files of a split, in the first place that has some."""

    def below(place: str, keep: Callable[[str], bool]) -> list[SourceFile]:
        if not storage.is_url(place) and not Path(place).is_dir():
            return []
        return files_in(place, lambda name: name.lower().endswith(suffix) and keep(name), Account())

    for name in split_folder_names(split, definition):
        prefixes = tuple(f"{name}{mark}" for mark in ("-", "_", "."))
        for place in (storage.join(folder, name), folder, storage.join(folder, "data")):
            whole = place == storage.join(folder, name)
            if found := below(place, lambda file, p=prefixes, w=whole: w or file.startswith(p)):  # type: ignore[misc]
                return found
    if split != "test":
        return []
    others = tuple(f"{n}{m}" for s in ("train", "val") for n in SPLIT_FOLDERS[s] for m in ("-", "_", "."))
    return below(folder, lambda file: not file.startswith(others))


def _members(tar: str, account: Account) -> tuple[dict[str, TarMember], dict[str, tuple[str, TarMember]]]:
    """Of a tar: its images, and what is said of each, by key. Other members are counted in `account`."""
    damage = Account()
    images: dict[str, TarMember] = {}
    said: dict[str, tuple[str, TarMember]] = {}
    for member in tar_members(tar, damage):
        key, extension = split_key(member.name)
        if is_hidden_member(member.name, key):
            account.skip(HIDDEN_MEMBERS, f"{tar}: {member.name}")
        elif extension in IMAGE_EXTENSIONS:
            if key in images:
                what = f"{tar} has two images called {key}"
                raise SourceError(what, remedy="give each image a name of its own")
            images[key] = member
        elif extension not in _SAID:
            account.skip(why_no_image(extension), f"{tar}: {member.name}")
        else:
            kept, other = said.get(key), (extension, member)
            if kept and kept[0] != "txt":
                kept, other = other, kept
            said[key] = other
            if kept:
                account.skip("labels or captions of images that have a label already", f"{tar}: {kept[1].name}")
    if damage.problems:
        raise SourceError(damage.problems[0], remedy="fetch the tar again")
    account.add(damage)
    return images, said


def _require_pairs(tar: str, images: dict[str, TarMember], said: dict[str, tuple[str, TarMember]]) -> None:
    """Raises SourceError for an image of which nothing is said, and for what is said of no image."""
    bare = next((key for key in images if key not in said), None)
    if bare is not None:
        raise SourceError(f"{tar}: {_BARE.format(bare)}", remedy=_WRITE_LABELS)
    used = {said[key][0] for key in images}
    lost = next((f"{key}.{kind}" for key, (kind, _) in said.items() if key not in images and kind in used), None)
    if lost is not None:
        remedy = "put the image into the same tar, or take that file out"
        raise SourceError(f"{tar}: {lost} has no image beside it", remedy=remedy)


def _read_said(wanted: tuple[str, str, int | None, str, TarMember]) -> int | list[int] | tuple[str, ...]:
    key, tar, classes, extension, member = wanted
    data, where = storage.read_bytes(tar, member.offset, member.size), f"{tar}: {key}.{extension}"
    if extension == "cls":
        return parse_label(data, where)
    if extension == "txt":
        return tuple(line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip())
    remedy = "write 0 or 1 for each class"
    try:
        marks = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # the last for a header that says petabytes
        raise SourceError(f"{where} cannot be read: {error}", remedy=remedy) from None
    if marks.shape != (classes or marks.size,) or not np.isin(marks, (0, 1)).all():
        raise SourceError(f"{where} is not a row of 0 and 1 for {classes or 'the'} classes", remedy=remedy)
    return [int(c) for c in np.flatnonzero(marks)]


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise cannot_read(path, error) from error
    except (DamagedParquetError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is damaged: {error}", remedy="fetch it again") from error


def _values(path: str, column: str) -> list[Any]:
    with _damage_named(path):
        file = open_parquet(path)
        if column not in file.schema_arrow.names:
            what = f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}"
            raise SourceError(what, remedy="keep files of one kind in a folder")
        groups = range(file.num_row_groups)
        return [
            value for group in groups for block in read_blocks(file, [column], group) for value in block[0].to_pylist()
        ]


def _said_column(path: str, definition: SetDefinition | None) -> tuple[str, list[str] | None]:
    """The column of labels or captions, and the class names that Hugging Face's metadata gives for it."""
    file = open_parquet(path)
    schema = file.schema_arrow
    try:
        image = image_column(file, path, None)
    except SourceError as error:
        raise UnlabelledError(error.what, remedy=error.remedy) from None
    wanted = _CAPTIONS if definition is not None and definition.task == "retrieval" else (*_LABELS, *_CAPTIONS)
    column = next((name for name in wanted if name in schema.names and name != image), None)
    if column is None:
        what = f"{path} has no column of labels or captions, only {', '.join(schema.names)}"
        raise UnlabelledError(what, remedy=f"call it {wanted[0]}")
    feature = hugging_face_features(schema).get(column, {})
    inner = feature.get("feature")
    names = feature.get("names") or (inner.get("names") if isinstance(inner, dict) else None)
    return column, names


def _texts(said: Any, where: str) -> list[str]:
    """The captions in a cell of a table; blank ones are none."""
    texts = said if isinstance(said, list) else [said]
    if others := [one for one in texts if not isinstance(one, str | None)]:
        what = f"{where} holds {type(others[0]).__name__}, not captions"
        raise SourceError(what, remedy="write a string, or a list of strings")
    return [one.strip() for one in texts if one and one.strip()]


def _with_labels(records: Records, said: list[Any], column: str) -> None:
    """Labels as they were found: numbers or names, or lists of either."""
    empty = next((s.key for s, one in zip(records.samples, said, strict=True) if one is None), None)
    if empty is not None:
        raise SourceError(f"{records.where}: {empty} has no {column}", remedy="give every image one")
    flat = [one for row in said for one in (row if isinstance(row, list) else [row])]
    if flat and all(isinstance(one, str) for one in flat):
        records.names = sorted(set(flat), key=natural_order)
        place = {name: place for place, name in enumerate(records.names)}
        numbered: list[Any] = [[place[one] for one in row] if isinstance(row, list) else place[row] for row in said]
        records.labels = numbered
    elif others := [one for one in flat if not isinstance(one, int)]:
        what = f"{records.where}: column {column!r} holds {type(others[0]).__name__}, such as {others[0]!r}"
        raise SourceError(what, remedy="labels are integers or names, or lists of either")
    else:
        records.labels = said


def _with_texts(records: Records, folder: str) -> Records:
    """With the class names and templates that are beside the images."""
    if records.captions is not None:
        return records
    there = set(storage.listing(folder))
    if CLASSNAMES in there and (records.layout != "folders" or records.names is None):
        records.classnames = read_classnames(folder)
    for name in (TEMPLATES, CLIP_BENCHMARK_TEMPLATES):
        if name in there:
            records.templates = read_templates(folder, name)
            break
    return records


def _places(folder: str, definition: SetDefinition | None) -> tuple[Callable[[str], int | None], int]:
    """What gives the label of a class folder, and the number of classes."""
    if definition is None:
        names = read_classnames(folder)
        return name_lookup(enumerate(names)), len(names)
    spelled = [*enumerate(class_names(definition)), *enumerate(class_folders(definition))]
    return name_lookup(spelled), definition.class_count
