"""The layout of Parquet files: a column of images, and one of labels (numbers, names, lists of either) or captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.image_set import Records, labels_of, relabel
from dimefm.datasets.layouts import UnlabelledError, add_class_texts, natural_order, split_files
from dimefm.datasets.unused_files import count_unused
from dimefm.errors import SourceError
from dimefm.sources.account import found_instead
from dimefm.sources.parquet import DamagedParquetError, hugging_face_features, open_parquet, read_blocks
from dimefm.sources.parquet_images import ParquetImages, image_column
from dimefm.sources.walk_folder import cannot_read

_LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
_CAPTIONS = ("caption", "captions", "text", "texts", "sentences", "raw", "txt")


def read_parquet(folder: str, split: str, definition: SetDefinition | None) -> Records | None:
    """Parquet files with one image per row and a column that is called as one of `_LABELS` or `_CAPTIONS`."""
    files = split_files(folder, split, ".parquet", definition)
    if not files:
        return None
    files.sort(key=lambda file: natural_order(file.path))
    with _damage_named(files[0].path):
        column, names = _annotation_column(files[0].path, definition)
    values = [value for file in files for value in _column_values(file.path, column)]
    records = Records(where=folder, layout="parquet", samples=[], files=files, names=names)
    account = records.account
    samples = records.samples = list(ParquetImages(files).samples(account))
    if account.problems:
        raise SourceError(account.problems[0], remedy="fetch the file again")
    several = any(sample.file.endswith("]") and not sample.file.endswith("[0]") for sample in samples)
    if several or len(samples) != len(values):
        what = f"{folder} has {len(values):,} rows and {len(samples):,} images{found_instead(account.lines())}"
        raise SourceError(what, remedy="write one image per row")
    count_unused(records, folder, files[0].path.rpartition("/")[0], split, own=definition is None)
    if column in _CAPTIONS:
        records.captions = [_captions_in(cell, f"{folder}: column {column!r}") for cell in values]
    else:
        _set_labels(records, values, column)
    return add_class_texts(records, folder)


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Turn the errors of a damaged file into a SourceError that names it."""
    try:
        yield
    except MemoryError as error:
        raise cannot_read(path, error) from error
    except (DamagedParquetError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is damaged: {error}", remedy="fetch it again") from error


def _column_values(path: str, column: str) -> list[Any]:
    with _damage_named(path):
        file = open_parquet(path)
        if column not in file.schema_arrow.names:
            what = f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}"
            raise SourceError(what, remedy="keep only files with the same columns in a folder")
        values = []
        for group in range(file.num_row_groups):
            for block in read_blocks(file, [column], group):
                values += block[0].to_pylist()
        return values


def _annotation_column(path: str, definition: SetDefinition | None) -> tuple[str, list[str] | None]:
    """The column of labels or captions, and the class names that Hugging Face's metadata gives for it."""
    file = open_parquet(path)
    schema = file.schema_arrow
    try:
        images = image_column(file, path, None)
    except SourceError as error:
        raise UnlabelledError(error.what, remedy=error.remedy) from None
    wanted = _CAPTIONS if definition is not None and definition.task == "retrieval" else (*_LABELS, *_CAPTIONS)
    column = next((name for name in wanted if name in schema.names and name != images), None)
    if column is None:
        what = f"{path} has no column of labels or captions, only {', '.join(schema.names)}"
        raise UnlabelledError(what, remedy=f"call it {wanted[0]}")
    feature = hugging_face_features(schema).get(column, {})
    inner = feature.get("feature")
    names = feature.get("names") or (inner.get("names") if isinstance(inner, dict) else None)
    return column, names


def _captions_in(cell: Any, where: str) -> list[str]:
    """The captions in a cell of a table, without blank ones."""
    texts = cell if isinstance(cell, list) else [cell]
    if others := [one for one in texts if not isinstance(one, str | None)]:
        what = f"{where} holds {type(others[0]).__name__}, not captions"
        raise SourceError(what, remedy="write a string, or a list of strings")
    return [one.strip() for one in texts if one and one.strip()]


def _set_labels(records: Records, values: list[Any], column: str) -> None:
    """Set `records.labels` to these numbers, names, or lists of either. Names are numbered in natural order."""
    empty = next((s.key for s, one in zip(records.samples, values, strict=True) if one is None), None)
    if empty is not None:
        raise SourceError(f"{records.where}: {empty} has no {column}", remedy="give every image one")
    flat = [one for cell in values for one in labels_of(cell)]
    if flat and all(isinstance(one, str) for one in flat):
        records.names = sorted(set(flat), key=natural_order)
        records.labels = relabel(values, {name: label for label, name in enumerate(records.names)})
    elif others := [one for one in flat if not isinstance(one, int)]:
        what = f"{records.where}: column {column!r} holds {type(others[0]).__name__}, such as {others[0]!r}"
        raise SourceError(what, remedy="labels are integers or names, or lists of either")
    else:
        records.labels = values
