"""Parts of an index: the rows of some shards of the store, each a unit of work that needs only the trained index.

A part is a file below build/, and a document beside it that is written after it: a file without its document is not
whole. The trained index, which has no rows, is kept in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache_schemas import IndexPart, SchemaError
from dimefm.errors import StoreError
from dimefm.retrieval.faiss_index import FaissIndex, use_threads
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.shard_work import Seat

TRAINED_FILE = "trained.faiss"


@dataclass(frozen=True)
class PartTask:
    """All that a worker in another process needs to build a part: `ranges` are rows of the store, `file` is the name
    below `folder`, `settings` those of the part's document."""

    store: str
    folder: str
    file: str
    settings: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of the store in it, with those that will be skipped."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def path(self) -> Path:
        """Where the part is written."""
        return Path(self.folder) / self.file


@dataclass(frozen=True)
class BuildParts:
    """The building of parts, as a `system.shard_work.ShardWork`."""

    def open(self, seat: Seat) -> Callable[[PartTask], None]:
        """A worker needs memory for the trained index and one part alone."""
        if seat.threads:
            use_threads(seat.threads)
        return partial(build_part, use_gpus=seat.device != "cpu")

    def name(self, unit: PartTask) -> str:
        """The part in messages."""
        return f"the part {unit.file}"


def build_part(part: PartTask, *, use_gpus: bool = True) -> None:
    """Build one part: read the trained index, add the rows, write the part and then its document; with all GPUs that
    this process sees, or none."""
    began = time.monotonic()
    index = FaissIndex.read(Path(part.folder) / TRAINED_FILE)
    skipped = index.add_rows(Store(part.store), part.ranges, use_gpus=use_gpus)
    write_part(index, part.path, part.settings, skipped=skipped, seconds=time.monotonic() - began)


def write_part(index: FaissIndex, path: Path, settings: str, *, skipped: int = 0, seconds: float = 0.0) -> IndexPart:
    """Write an index below build/, and then its document."""
    index.write(path)
    document = IndexPart(
        settings=settings,
        rows=index.rows,
        skipped=skipped,
        bytes=path.stat().st_size,
        digest=storage.digest_file(str(path)),
        seconds=round(seconds, 3),
        spread=index.spread,
    )
    with storage.writing_to(str(path)):
        storage.write_json(str(path.with_suffix(".json")), document.to_json())
    return document


def finished_part(path: Path, settings: str) -> IndexPart | None:
    """The document of a file below build/, or None where the file must be made again: it or the document is missing,
    damaged, or of other settings."""
    where = path.with_suffix(".json")
    if not where.exists() or not path.exists():
        return None
    try:
        found = IndexPart.parse(storage.read_json(str(where)), str(where))
    except (StoreError, SchemaError):
        return None
    whole = found.bytes == path.stat().st_size and found.digest == storage.digest_file(str(path))
    return found if whole and found.settings == settings else None
