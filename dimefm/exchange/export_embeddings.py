"""`export-embeddings` as one call: write a store as a folder in clip-retrieval's layout
(see exchange.clip_retrieval_folder). exchange.export_parquet writes one as a Parquet data set.

Shapes: N rows of a file, D embedding width.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Status
from dimefm.errors import OutputExistsError
from dimefm.exchange.clip_retrieval_folder import CAPTION, FOLDERS
from dimefm.store.embedding_store import Store
from dimefm.store.failures import require_embeddings
from dimefm.store.reopen import reopen
from dimefm.system import storage
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here

_COPIES = 4  # of a file's rows in the memory of a worker: as read, those with an embedding, and the file itself


def export_embeddings(
    store_path: str, out: str, *, rows_per_file: int | None = None, run: ShardRunner = run_here
) -> str:
    """Write a finished store as a folder in clip-retrieval's layout, in the store's type; returns the folder's path.

    There is one .npy and one metadata file per `rows_per_file` rows of the store, by default those of a shard; rows
    without an embedding are left out. The metadata has `row` (in the store), `key`, for texts `caption`, and for
    images `image_path` (the key again) and `file`. `run` has the files written. The folder appears whole or not at all.
    Raises StoreError for a store that is unfinished or has no embedding, OutputExistsError where `out` is not empty.
    """
    store = open_finished(store_path)
    target = Path(storage.local(out, "an export"))
    require_name(out, "a folder of embeddings")
    if target.is_file() or storage.listing(str(target)):
        raise OutputExistsError(f"{target} exists and is not empty", remedy="give another --out, or delete it")
    rows, step = store.schema.rows, rows_per_file or store.schema.shard_rows
    files = range(-(-rows // step))
    with storage.publishing(str(target)) as temporary, Progress("exporting", rows, "row") as progress:
        work, done = ExportFiles(store.path, str(temporary), out, step), 0
        memory = _COPIES * store.schema.shard_bytes * min(step, rows) // min(store.schema.shard_rows, rows)
        for number, _ in run(work, files, progress.note, memory=memory):
            done += min(step, rows - number * step)
            progress.at(done)
    return str(target)


def open_finished(path: str) -> Store:
    """A store that can be exported. Raises StoreError for one that is unfinished or has no embedding."""
    store = Store(path)
    store.require_complete()
    require_embeddings(store)
    return store


@dataclass(frozen=True)
class ExportFiles:
    """The writing of the files of an export, a .npy and its metadata at a time, as a `system.shard_work.ShardWork`.
    `folder` is where they are written, `out` where the user will find them."""

    store: str
    folder: str
    out: str
    rows_per_file: int

    def open(self, seat: Seat) -> Callable[[int], None]:
        """Raises UnreadableError where the store or the folder is not there."""
        return partial(self._write_file, reopen(self.store, self.folder))

    def name(self, unit: int) -> str:
        """The file in messages."""
        return f"file {unit} of the export"

    def _write_file(self, store: Store, number: int) -> None:
        rows, start = store.schema.rows, number * self.rows_per_file
        stop = min(start + self.rows_per_file, rows)
        good_N = np.flatnonzero(store.status(start, stop) == Status.OK)
        if not len(good_N):
            return
        folder, name = Path(self.folder), FOLDERS[store.schema.kind]
        suffix = numbered(number, rows, self.rows_per_file)
        vectors, table = io.BytesIO(), io.BytesIO()
        np.save(vectors, store.read(start, stop)[good_N])
        pq.write_table(_metadata(store, start, stop).take(good_N), table)
        with storage.writing_to(self.out):
            _write(folder / name / f"{name}_{suffix}.npy", vectors)
            _write(folder / "metadata" / f"metadata_{suffix}.parquet", table)


def numbered(number: int, rows: int, rows_per_file: int) -> str:
    """The number of a file of an export, padded so that names stand in the order of their rows."""
    return f"{number:0{len(str((rows - 1) // rows_per_file))}d}"


def _write(path: Path, data: io.BytesIO) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.getbuffer())
    storage.flush(str(path))  # by who wrote it: on a network share nobody else can


def _metadata(store: Store, start: int, stop: int) -> pa.Table:
    """The metadata of rows start..stop-1."""
    plan = planned(store, start, stop)
    columns = {"row": plan["row"], "key": plan["key"]}
    if store.schema.kind == "text":
        return pa.table({CAPTION: plan["text"], **columns})
    return pa.table({"image_path": plan["key"], **columns, "file": plan["file"]})


def planned(store: Store, start: int, stop: int) -> pa.Table:
    """What the plans of their shards say of rows start..stop-1."""
    size = store.schema.shard_rows
    first, last = start // size, (stop - 1) // size
    plan = pa.concat_tables([store.plan(shard) for shard in range(first, last + 1)])
    return plan.slice(start - first * size, stop - start)
