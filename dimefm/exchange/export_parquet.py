"""`export-embeddings --format parquet` as one call: a store as a Parquet data set, for pandas, DuckDB and
Hugging Face's datasets.

    row        int64                    in the store
    key        string
    text|file  string                   the sentence, or the file that the image was read from
    vector     fixed_size_list<float32>[D]
    ...        what was asked for: see exchange.parquet_columns

The vectors are float32 whatever the type of the store, which holds every value of float16: not all readers know
Parquet's float16, and none needs to be told how long a list of fixed size is. Shapes: N rows of a group, D width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Status
from dimefm.errors import OutputExistsError
from dimefm.exchange.export_embeddings import numbered, open_finished, planned
from dimefm.exchange.parquet_columns import MoreColumns, more_columns
from dimefm.store.embedding_store import Store
from dimefm.store.reopen import reopen
from dimefm.system import storage
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here
from dimefm.system.wording import counted

SUFFIX = ".parquet"
"""A name that ends so is that of one file, any other that of a folder."""

_GROUP_ROWS, _GROUPS = 4096, 4  # of a row group, which is in memory as a whole: as read, float32, and as written


@dataclass(frozen=True)
class ParquetConfig:
    """What to export, and where to."""

    store: str
    """Finished store."""
    out: str
    """Folder to write. A name that ends in .parquet is that of one file, of Parquet."""
    rows_per_file: int | None = None
    """Rows of the store per file. Default: those of a shard."""
    pairs: str | None = None
    """Pairs over the store, from retrieve: images get a column score, the cosine of their nearest sentence, sentences
    get hits, how many images have them among their top k. Parquet only."""
    clusters: int | None = None
    """Adds a column cluster: which of N clusters, by k-means of a sample, is nearest. Parquet only."""
    map: bool = False
    """Adds columns x and y: places on a map by the two principal components of a sample. Parquet only."""
    thumbnails: int | None = None
    """Adds a column thumbnail: each image as a JPEG whose longer side has at most SIDE pixels. Parquet only."""


def export_parquet(config: ParquetConfig, run: ShardRunner = run_here) -> str:
    """Write a finished store as Parquet: one file where `out` ends in .parquet, else a folder with a file per
    `rows_per_file` rows of the store. Rows without an embedding are left out. Returns the path, which appears whole or
    not at all. `run` has the files written.

    Raises StoreError for a store that is unfinished or has no embedding, MismatchError for pairs of other stores and
    for columns that the store cannot have, OutputExistsError where something is at `out`.
    """
    target = Path(storage.local(config.out, "an export"))
    one = target.suffix.lower() == SUFFIX
    if not one:
        require_name(config.out, "a folder of embeddings")
    if target.is_file() or storage.listing(str(target)) or (one and target.is_dir()):
        raise OutputExistsError(f"{target} exists", remedy="give another --out, or delete it")
    store = open_finished(config.store)
    more = more_columns(
        store, pairs=config.pairs, clusters=config.clusters, map_=config.map, thumbnails=config.thumbnails
    )
    rows = store.schema.rows
    step = rows if one else config.rows_per_file or store.schema.shard_rows
    with storage.publishing(str(target)) as temporary, Progress("exporting", rows, "row") as progress:
        work, lacking = ParquetFiles(store.path, str(temporary), str(target), step, more), Counter[str]()
        if one:
            lacking = work.write(store, temporary / target.name, 0, rows, progress.at)
            with storage.writing_to(str(target)):
                (temporary / target.name).rename(target)
                temporary.rmdir()
                storage.flush(str(target))
        else:
            done, memory = 0, _GROUPS * _GROUP_ROWS * store.schema.dim * 4
            for number, found in run(work, range(-(-rows // step)), progress.note, memory=memory):
                lacking += found
                done += min(step, rows - number * step)
                progress.at(done)
    if lacking:
        (reason, _), *_ = lacking.most_common(1)
        note(f"thumbnail is null for {counted(lacking.total(), 'image')}, such as: {reason}")
    return str(target)


@dataclass(frozen=True)
class ParquetFiles:
    """The writing of the files of a folder, as a `system.shard_work.ShardWork`: of each why pictures are missing, and
    how often. `folder` is where they are written, `out` where the user will find them."""

    store: str
    folder: str
    out: str
    rows_per_file: int
    more: MoreColumns

    def open(self, seat: Seat) -> Callable[[int], Counter[str]]:
        """Raises UnreadableError where the store or the folder is not there."""
        return partial(self._write_file, reopen(self.store, self.folder))

    def name(self, unit: int) -> str:
        """The file in messages."""
        return f"file {unit} of the export"

    def _write_file(self, store: Store, number: int) -> Counter[str]:
        rows, start = store.schema.rows, number * self.rows_per_file
        name = f"embeddings_{numbered(number, rows, self.rows_per_file)}{SUFFIX}"
        return self.write(store, Path(self.folder, name), start, min(start + self.rows_per_file, rows))

    def write(
        self, store: Store, path: Path, start: int, stop: int, at: Callable[[int], None] = lambda _: None
    ) -> Counter[str]:
        """Write rows start..stop-1 as one file, none where no row has an embedding; `at` is told how far it is. Returns
        why pictures are missing, with counts."""
        lacking: Counter[str] = Counter()
        add = self.more.open(store)
        with storage.writing_to(self.out), ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for first in range(start, stop, _GROUP_ROWS):
                last = min(first + _GROUP_ROWS, stop)
                good_N = np.flatnonzero(store.status(first, last) == Status.OK)
                if len(good_N):
                    table = _table(store, first, last, good_N)
                    table = add(table, first + good_N, lacking)
                    if writer is None:
                        table = table.replace_schema_metadata(_features(table.schema))
                        writer = stack.enter_context(_writer(path, table.schema))
                    writer.write_table(table.cast(writer.schema))
                at(last)
        if writer is not None:
            storage.flush(str(path))  # by who wrote it: on a network share nobody else can
        return lacking


def _table(store: Store, start: int, stop: int, good_N: np.ndarray[Any, Any]) -> pa.Table:
    """The columns of every export, of those of rows start..stop-1 that are at the places `good_N`."""
    plan = planned(store, start, stop).take(good_N)
    name = "text" if store.schema.kind == "text" else "file"
    vector_ND = store.read(start, stop)[good_N].astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.ravel()), store.schema.dim)
    return pa.table({"row": plan["row"], "key": plan["key"], name: plan[name], "vector": vectors})


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Vectors and JPEGs are written as they are: no dictionary and no compression makes them smaller."""
    words = [field.name for field in schema if pa.types.is_string(field.type)]
    packing = {name: "zstd" if name in words else "none" for name in _leaves(schema)}
    return pq.ParquetWriter(path, schema, use_dictionary=words, compression=packing, write_statistics=["row"])


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns by their names in Parquet."""
    found = []
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            found.append(f"{field.name}.list.element")
        elif pa.types.is_struct(field.type):
            found += [f"{field.name}.{part.name}" for part in field.type]
        else:
            found.append(field.name)
    return found


def _features(schema: pa.Schema) -> dict[str, str]:
    """The columns as Hugging Face's datasets names them, so that a thumbnail is an image there."""
    features: dict[str, Any] = {}
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            part = {"dtype": "float32", "_type": "Value"}
            features[field.name] = {"feature": part, "length": field.type.list_size, "_type": "Sequence"}
        elif pa.types.is_struct(field.type):
            features[field.name] = {"_type": "Image"}
        else:
            kind = {"float": "float32"}.get(str(field.type), str(field.type))
            features[field.name] = {"dtype": kind, "_type": "Value"}
    return {"huggingface": json.dumps({"info": {"features": features}})}
