"""Read folders of embeddings in the layout of clip-retrieval; exchange.export_embeddings writes them.

FOLDER/
  img_emb/img_emb_<n>.npy        float16 or float32 (rows, D); for texts text_emb/text_emb_<n>.npy
  metadata/metadata_<n>.parquet  as many rows as the .npy of the same number: image_path, caption, and more

Numbers may be padded with zeros and may leave gaps; only their order counts. Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.embedding_store import Kind
from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.files import stat_files
from dimefm.sources.parquet import other_kind
from dimefm.system import storage

FOLDERS: dict[Kind, str] = {"image": "img_emb", "text": "text_emb"}
"""Where the embeddings of images and of texts are."""

CAPTION = "caption"
"""The column of the sentences in the metadata of texts."""

_IMAGE_KEYS = ("image_path", "key")
_BLOCK = 4096  # rows that are normalised, or read from a metadata file, at a time
_UNIT = 1e-3  # a vector whose norm is this close to 1 is not normalised again


@dataclass(frozen=True)
class _Part:
    """One .npy and its metadata: rows start..stop-1."""

    vectors: str
    metadata: str
    start: int
    stop: int


class Folder:
    """A folder in clip-retrieval's layout, or the first `limit` rows of one. Opening it checks the header of every file
    and reads nothing else; other files and rows are counted in `account`."""

    def __init__(self, root: str, kind: Kind, account: Account | None = None, limit: int | None = None) -> None:
        account = Account() if account is None else account
        self.root = storage.local(root, "a folder of embeddings")
        self.kind = kind
        vectors = _numbered(f"{self.root}/{FOLDERS[kind]}", FOLDERS[kind], ".npy", account)
        metadata = _numbered(f"{self.root}/metadata", "metadata", ".parquet", account)
        for number in sorted(vectors.keys() ^ metadata.keys()):
            there = vectors.get(number) or metadata[number]
            other = "metadata" if number in vectors else FOLDERS[kind]
            raise SourceError(f"{there} has no file of its number in {other}/", remedy="complete the folder")
        self.parts: list[_Part] = []
        self.rows, self.dim = 0, 0
        for number in sorted(vectors):
            self._add(vectors[number], metadata[number])
        if not self.rows:
            raise SourceError(f"{self.root} holds no embedding", remedy="check the folder and --kind")
        if limit and limit < self.rows:
            account.skip("rows behind --limit", f"row {limit}", self.rows - limit)
            self.rows = limit

    def _add(self, vectors: str, metadata: str) -> None:
        rows, dim = _map(vectors).shape
        with _open_parquet(metadata) as file:
            described, names = file.metadata.num_rows, file.schema_arrow.names
        if rows != described:
            what = f"{vectors} has {rows:,} rows and {metadata} has {described:,}"
            raise SourceError(what, remedy="they do not belong together, or one was cut short: make both again")
        if self.parts and dim != self.dim:
            what = f"{vectors} is {dim} wide, those before it {self.dim}"
            raise SourceError(what, remedy="import the embeddings of each model into a store of their own")
        if self.kind == "text" and CAPTION not in names:
            what = f"{metadata} has no column {CAPTION!r} (it has {', '.join(names)})"
            raise SourceError(what, remedy="texts cannot do without their captions: make the metadata again")
        self.parts.append(_Part(vectors, metadata, self.rows, self.rows + rows))
        self.rows, self.dim = self.rows + rows, dim

    def files(self) -> list[SourceFile]:
        """Every .npy and every metadata file, with its size."""
        return stat_files([p.vectors for p in self.parts] + [p.metadata for p in self.parts])

    def read(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Rows start..stop-1, normalised, float16 (N, D), zero where a vector cannot be; and which can be (N,)."""
        embedding_ND = np.zeros((stop - start, self.dim), np.float16)
        good_N = np.zeros(stop - start, bool)
        for part in self.parts:
            if part.stop <= start or stop <= part.start:
                continue
            mapped = _map(part.vectors)
            last = min(stop, part.stop)
            for first in range(max(start, part.start), last, _BLOCK):
                after = min(first + _BLOCK, last)
                block = slice(first - start, after - start)
                embedding_ND[block], good_N[block] = unit(mapped[first - part.start : after - part.start])
        return embedding_ND, good_N

    def records(self) -> Iterator[tuple[str, str | None]]:
        """Key and caption of every row. The caption is None for a text without one, and for every image."""
        yield from islice(chain.from_iterable(map(self._records, self.parts)), self.rows)

    def lookup(self, rows: list[int]) -> dict[int, tuple[str, str | None]]:
        """`records` for a few rows. Reads each file only up to the last of them."""
        found = {}
        for part in self.parts:
            wanted = {row - part.start for row in rows if part.start <= row < part.stop}
            for within, record in enumerate(islice(self._records(part), max(wanted, default=-1) + 1)):
                if within in wanted:
                    found[part.start + within] = record
        return found

    def _records(self, part: _Part) -> Iterator[tuple[str, str | None]]:
        name = Path(part.vectors).name
        for row, value in enumerate(self._column(part)):
            if self.kind == "text":
                yield f"{name}:{row}", value
            else:
                yield value or f"{name}:{row}", None

    def _column(self, part: _Part) -> Iterator[str | None]:
        with _open_parquet(part.metadata) as file:
            wanted = (CAPTION,) if self.kind == "text" else _IMAGE_KEYS
            column = next((name for name in wanted if name in file.schema_arrow.names), None)
            if column is None:
                yield from [None] * (part.stop - part.start)
                return
            # One thread: Arrow's own can outlive the interpreter.
            for batch in file.iter_batches(_BLOCK, columns=[column], use_threads=False):
                yield from batch.column(0).cast(pa.string()).to_pylist()


def _numbered(folder: str, stem: str, ending: str, account: Account) -> dict[int, str]:
    """By number, the files stem_<n>ending of a folder. Raises SourceError for other names with that ending."""
    found: dict[int, str] = {}
    for name in storage.listing(folder):
        if not name.endswith(ending):
            account.skip(f"files beside the {ending} of embeddings", f"{folder}/{name}")
            continue
        match = re.fullmatch(rf"{stem}_(\d+)\{ending}", name)
        if match is None:
            raise SourceError(f"{folder}/{name} is not named {stem}_<number>{ending}", remedy="rename or remove it")
        if int(match[1]) in found:
            what = f"{folder}/{name} and {found[int(match[1])]} have the same number"
            raise SourceError(what, remedy="remove the one that does not belong here")
        found[int(match[1])] = f"{folder}/{name}"
    if not found:
        remedy = f"give the folder that has {Path(folder).name}/ in it, and look at --kind"
        raise SourceError(f"{folder} holds no {stem}_<number>{ending}", remedy=remedy)
    return found


def _map(path: str) -> np.ndarray[Any, Any]:
    """A .npy as a memory map (N, D). Nothing is unpickled; an array of objects is refused."""
    try:
        mapped: np.ndarray[Any, Any] = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        instead = other_kind(path)
        what = f"{path} cannot be read as a plain .npy: {f'it is {instead}' if instead else error}"
        remedy = (
            "fetch or make it again" if instead else "write it again with numpy.save, as a float16 or float32 array"
        )
        raise SourceError(what, remedy=remedy) from None
    if mapped.ndim != 2 or mapped.dtype.kind != "f" or mapped.dtype.itemsize not in (2, 4):
        what = f"{path} is {mapped.dtype} {mapped.shape}, where float16 or float32 (rows, width) belongs"
        raise SourceError(what, remedy="write one embedding per row, as float16 or float32")
    return mapped


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """A ParquetFile, closed after the block. Raises SourceError where it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        instead = other_kind(path)
        what = f"{path} cannot be read: {f'it is {instead}' if instead else error}"
        raise SourceError(what, remedy="fetch or make it again" if instead else "write it again as Parquet") from None


def unit(vectors_ND: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Normalised vectors, float16 (N, D), and which of them can be normalised (N,); the others become zero. A vector
    whose norm is within 0.001 of 1 is only rounded, so that a float16 unit vector does not change."""
    values_ND = np.asarray(vectors_ND, np.float32)
    norm_N = np.linalg.norm(values_ND.astype(np.float64), axis=1)
    good_N = np.isfinite(norm_N) & (norm_N > 0)
    scale_N = np.where(good_N & (abs(norm_N - 1) > _UNIT), norm_N, 1)
    embedding_ND = np.where(good_N[:, None], values_ND, 0) / scale_N[:, None]
    return embedding_ND.astype(np.float16), good_N
