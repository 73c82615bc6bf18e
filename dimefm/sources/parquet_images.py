"""Images in a column of Parquet files.

Shapes: N images of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError, StoreError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample
from dimefm.sources.caption_reader import CaptionReader
from dimefm.sources.files import look_up
from dimefm.sources.parquet import (
    Column,
    DamagedParquetError,
    as_strings,
    byte_lengths,
    columns_of,
    describe_damage,
    flat_values,
    hugging_face_features,
    is_bytes,
    is_list,
    is_string,
    open_parquet,
    places_in_lists,
    read_blocks,
)
from dimefm.sources.parquet_captions import CaptionsByRow, caption_column, captions_by_row, of_single_images
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage
from dimefm.system.named_paths import named
from dimefm.system.near_names import did_you_mean
from dimefm.system.read_ahead import reading_ahead

_KEYS = ("key", "__key__", "id", "path")
_LONGEST_DIGEST = 64  # bytes, of SHA-512: a column whose values are all of one such length holds no images
_ADDRESS = re.compile("ur[li]|image|img|path|file", re.IGNORECASE)


class ParquetImages:
    """Parquet files with a column of encoded images: binary, a struct with a binary field `bytes`, or lists of either,
    each element of which is an image. Where `bytes` is null and the struct has a `path`, the image is the file at that
    path, from the folder of the Parquet file on.

    The key is the value of a string column called key, __key__, id or path, else the struct's `path`, else file:row; in
    lists, :N follows it unless it is a path. Without `column`, the images are in the only column that could hold them.
    Files that were `found` in a folder and have no such column are counted; a file that was named is an error then.
    `captions` is a column of strings, or of lists of strings: the captions of the image of the same row.
    Files that are images of their own, named by a path, are added to `taken`.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        column: str | None = None,
        captions: str | None = None,
        *,
        found: bool = False,
        taken: set[str] | None = None,
    ) -> None:
        self._files, self._column, self._found, self._taken = files, column, found, taken
        self._captions = captions

    def files(self) -> list[SourceFile]:
        """The Parquet files, as given."""
        return list(self._files)

    def check(self) -> None:
        """Raises SourceError where the first file has no such column, or several that could be meant, or none of
        captions."""
        path = self._files[0].path
        try:
            file = open_parquet(path)
            self._column_of(file, path, Account())
            caption_column(file, path, self._captions, Account(), found=self._found)
        except (OSError, MemoryError, DamagedParquetError):
            return  # this is reported when the samples are listed

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by file and row, a null one with a size of 0. Raises SourceError as `check` does, for every file."""
        for path in (file.path for file in self._files):
            rows, reader = 0, CaptionReader(path, account)
            try:
                file = open_parquet(path)
                column = self._column_of(file, path, account)
                if column is None:
                    continue
                captions = caption_column(file, path, self._captions, account, found=self._found)
                for batch in _batches(file, column, captions):
                    texts = captions_by_row(path, rows, batch, captions, reader)
                    for sample in _images(path, rows, batch, column, texts, account):
                        if self._taken is not None and not sample.file.startswith(f"{path}#"):
                            self._taken.add(sample.file)
                        yield sample
                    rows += len(batch)
                if rows == 0:
                    account.skip("Parquet files without rows", path)
            except DamagedParquetError as error:
                account.problem(describe_damage(path, rows, error))
            except (OSError, MemoryError) as error:
                raise cannot_read(path, error) from error
            reader.finish()

    def _column_of(self, file: pq.ParquetFile, path: str, account: Account) -> str | None:
        """The column of images; None where the file has none and was counted."""
        if self._found and not _usable(file.schema_arrow, self._column):
            reason = "Parquet files without a column of images (name one with --column)"
            if self._column:
                reason = f"Parquet files without a column {self._column!r} of images"
            account.skip(reason, f"{path}, which has {_describe_columns(file.schema_arrow)}")
            return None
        return image_column(file, path, self._column)


def image_column(file: pq.ParquetFile, path: str, column: str | None) -> str:
    """`column`, or the only one that could hold images. Raises SourceError with the candidates."""
    schema = file.schema_arrow
    usable = _usable(schema, column)
    if len(usable) > 1:  # the metadata may tell images from sounds
        features = hugging_face_features(schema)
        images = [name for name in usable if features.get(name, {}).get("_type") == "Image"]
        usable = images if len(images) == 1 else usable
    if len(usable) == 1:
        return usable[0]
    raise _no_column_of_images(schema, path, column, usable)


def _no_column_of_images(schema: pa.Schema, path: str, column: str | None, usable: list[str]) -> SourceError:
    """The error for a file with several `usable` columns, or with none."""
    candidates = usable or _usable(schema, None)
    kinds = "images are binary, a struct with bytes, or lists of either"
    if usable:
        what = f"{path} has several columns that could hold the images"
    else:
        what = f"{path} has no column {f'{column!r} ' if column else ''}of images"
    if candidates:
        what += f": {', '.join(candidates)}" if usable else f"; these could hold them: {', '.join(candidates)}"
        remedy = did_you_mean(column or "", candidates, f"name one with --column NAME; {kinds}")
    else:
        what += f", only {_describe_columns(schema)}"
        remedy = f"leave it out, or write the images into it: {kinds}"
    if not usable and any(_is_address(field) for field in schema):
        remedy += "; download images that are named by an address, for example by img2dataset, and decode base64"
    return SourceError(what, remedy=remedy)


def _usable(schema: pa.Schema, column: str | None) -> list[str]:
    """`column` if it can hold images. Without it the columns that may be meant: those of images, or else of lists of
    images, or else fields of struct columns."""
    found = {name: one for name, one in columns_of(schema).items() if not one.in_list and _holds_images(one.type)}
    if column is not None:
        return [column] if column in found else []
    likely = {name: one for name, one in found.items() if not _is_digest(one.type)}
    top = [name for name, one in likely.items() if len(one.fields) == 1]
    fields = [name for name, one in likely.items() if ".".join(one.fields[:-1]) not in likely]
    images = [name for name in top if not is_list(likely[name].type)]
    return images or top or fields


def _holds_images(type_: pa.DataType) -> bool:
    one = type_.value_type if is_list(type_) else type_
    if not pa.types.is_struct(one):
        return is_bytes(one)
    index = one.get_field_index("bytes")
    if index < 0:
        return False
    kind = one.field(index).type
    return is_bytes(kind) or (pa.types.is_null(kind) and _has_path(one))


def _is_digest(type_: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_binary(type_) and type_.byte_width <= _LONGEST_DIGEST)


def _has_path(type_: pa.DataType) -> bool:
    index = type_.get_field_index("path") if pa.types.is_struct(type_) else -1
    return index >= 0 and is_string(type_.field(index).type)


def _is_address(field: pa.Field) -> bool:
    return is_string(field.type) and _ADDRESS.search(field.name) is not None


def _describe_columns(schema: pa.Schema) -> str:
    """The names of the columns, with a note on one that could be taken for images."""
    address = next((field.name for field in schema if _is_address(field)), None)
    note = f" ({address} holds strings, such as addresses or base64, not images)" if address else ""
    return f"{', '.join(schema.names) or 'no columns'}{note}"


def _key_column(schema: pa.Schema) -> str | None:
    columns = columns_of(schema)
    return next((name for name in _KEYS if name in columns and is_string(columns[name].type)), None)


def _batches(file: pq.ParquetFile, name: str, captions: Column | None) -> Iterator[pa.RecordBatch]:
    """The columns that are needed of the file, a bounded block at a time. The images are read to know their lengths,
    which Parquet does not keep apart from them."""
    column, key = columns_of(file.schema_arrow)[name], _key_column(file.schema_arrow)
    leaves = [column.leaf]
    if pa.types.is_struct(column.type):
        leaves = [f"{column.leaf}.bytes", *([f"{column.leaf}.path"] if _has_path(column.type) else [])]
    for group in range(file.metadata.num_row_groups):
        wanted = [*leaves, *([key] if key else []), *([captions.leaf] if captions else [])]
        yield from read_blocks(file, [*dict.fromkeys(wanted)], group)


def _images(
    path: str, before: int, batch: pa.RecordBatch, name: str, texts: CaptionsByRow, account: Account
) -> Iterator[ImageSample]:
    """The images of a batch that has `before` rows before it in its file, with the captions of their rows."""
    key_column = _key_column(batch.schema)
    keys = as_strings(batch.column(key_column)) if key_column else None
    values, rows_N = flat_values(batch, columns_of(batch.schema)[name])
    in_lists = rows_N is not None
    if rows_N is None:
        rows_N = np.arange(len(batch))
    elif len(empty := np.setdiff1d(np.arange(len(batch)), rows_N)):
        reason = "rows of Parquet files without an image in their list"
        account.skip(reason, f"{path}, row {before + empty[0]}", len(empty))
    rows: list[int] = rows_N.tolist()
    paths: list[str | None] = [None] * len(values)
    if _has_path(values.type):
        paths = as_strings(pc.struct_field(values, "path"))
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    sizes = byte_lengths(values)
    if in_lists and texts:
        texts = of_single_images(texts, rows, path, before, account)
    elsewhere = {i: own for i, own in enumerate(paths) if own and sizes[i] is None}
    files = _files_at(elsewhere, path, [before + row for row in rows], account)
    for i, (row, place, size, own) in enumerate(zip(rows, places_in_lists(rows), sizes, paths, strict=True)):
        key = (keys[row] if keys else own) or f"{path.rpartition('/')[2]}:{before + row}"
        if in_lists and not (own and keys is None):
            key += f":{place}"
        if i not in elsewhere:
            where = f"{path}#{name}[{place}]" if in_lists else f"{path}#{name}"
            yield ImageSample(key, where, before + row, size or 0, texts.get(row, ()))
        elif file := files.get(i):
            yield ImageSample(key, file.path, 0, file.size, texts.get(row, ()))


def _files_at(paths: dict[int, str], table: str, rows: Sequence[int], account: Account) -> dict[int, SourceFile]:
    """The files at the paths that a table has for some images in place of their bytes, by the number of the image.
    Those that do not exist, or that a document may not name, are counted. `rows` are those of all images."""
    folder = table.rpartition("/")[0]
    whole: dict[int, str] = {}
    for i, path in paths.items():
        is_whole = storage.is_url(path) or path.startswith("/")
        try:
            whole[i] = named(path if is_whole else storage.join(folder, path), f"{table}, row {rows[i]},")
        except StoreError as error:
            account.skip("images that are named by a path that a document may not name", error.what)
    found = {}
    places = list(whole.values())
    for i, place in zip(whole, reading_ahead(look_up, places, places[0] if places else table), strict=True):
        if place is None or place.file is None:
            reason = "images that are named by a path at which there is no file"
            account.skip(reason, f"{table}, row {rows[i]}: {whole[i]}")
        else:
            found[i] = place.file
    return found
