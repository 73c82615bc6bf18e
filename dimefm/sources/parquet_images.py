"""Images in a column of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, SourceFile
from dimefm.sources.parquet import DamagedParquetError, blocks, is_string, open_parquet
from dimefm.sources.walking import unreadable

_KEYS = ("key", "__key__", "id", "path")


class ParquetImages:
    """Parquet files with a column of encoded images: binary, or a struct with a binary field `bytes`.

    The key is that of a string column called key, __key__, id or path, else the `path` in the struct, else file:row.
    Without `column`, it is the only one that could hold images.
    """

    def __init__(self, files: Sequence[SourceFile], column: str | None = None, *, found: bool = False) -> None:
        self._files, self._column, self._found = files, column, found

    def files(self) -> list[SourceFile]:
        """The Parquet files, as given."""
        return list(self._files)

    def check(self) -> None:
        """Raises SourceError where the first file has no such column, or more than one that could be meant."""
        if self._found:
            return  # it is found out with the samples
        try:
            image_column(open_parquet(self._files[0].path), self._files[0].path, self._column)
        except (OSError, MemoryError, DamagedParquetError):
            return  # it is reported with the samples

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Images by file and row, null ones with a size of 0. Raises SourceError as `check` does, for every file."""
        for path in (file.path for file in self._files):
            rows = 0
            try:
                if self._found and not _candidates(open_parquet(path), self._column):
                    account.skip("Parquet files without a column of images", path)
                    continue
                for sample in self._images(path):
                    rows += 1
                    yield sample
            except DamagedParquetError as error:
                account.problem(f"{path}: broken after {rows} rows ({error}); what follows is lost")
            except (OSError, MemoryError) as error:
                raise unreadable(path, error) from error

    def _images(self, path: str) -> Iterator[ImageSample]:
        file = open_parquet(path)
        column = image_column(file, path, self._column)
        schema = file.schema_arrow
        type_ = schema.field(column).type
        key = next((name for name in _KEYS if _is_string_column(schema, name)), None)
        in_struct = key is None and _has_string_field(type_, "path")
        struct = [f"{column}.bytes", *([f"{column}.path"] if in_struct else [])]
        columns = [*(struct if pa.types.is_struct(type_) else [column]), *([key] if key else [])]
        name, where, row = path.rpartition("/")[2], f"{path}#{column}", 0
        for group in range(file.metadata.num_row_groups):
            # Parquet keeps no lengths apart from the values: the images are read, a bounded block at a time.
            for batch in blocks(file, columns, group):
                images, keys = batch.column(column), batch.column(key) if key else pa.nulls(len(batch))
                if pa.types.is_struct(images.type):
                    keys = pc.struct_field(images, "path") if in_struct else keys
                    images = pc.struct_field(images, "bytes")
                sizes = pc.binary_length(images).fill_null(0).to_pylist()
                for size, given in zip(sizes, keys.to_pylist(), strict=True):
                    yield ImageSample(given or f"{name}:{row}", where, row, size)
                    row += 1


def image_column(file: pq.ParquetFile, path: str, column: str | None) -> str:
    """`column`, or the only one that could hold images. Raises SourceError with the candidates."""
    found = [field.name for field in file.schema_arrow if _holds_images(field.type)]
    if column is None and len(found) == 1:
        return str(found[0])
    if column in found:
        return str(column)
    names = ", ".join(found) or f"none among {', '.join(file.schema_arrow.names)}"
    what = f"{path} has no column {column!r} of images" if column else f"{path} does not say which column is the images"
    remedy = "name one with --column NAME; images are binary, or a struct with bytes"
    raise SourceError(f"{what}; there could be: {names}", remedy=remedy)


def _candidates(file: pq.ParquetFile, column: str | None) -> list[str]:
    names = [field.name for field in file.schema_arrow if _holds_images(field.type)]
    return names if column is None else [name for name in names if name == column]


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and _holds_images(type_.field(index).type)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _has_string_field(type_: pa.DataType, name: str) -> bool:
    index = type_.get_field_index(name) if pa.types.is_struct(type_) else -1
    return index >= 0 and is_string(type_.field(index).type)


def _is_string_column(schema: pa.Schema, name: str) -> bool:
    index = schema.get_field_index(name)
    return index >= 0 and is_string(schema.field(index).type)
