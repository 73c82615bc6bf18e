"""The features of a set: each image encoded once, kept in an embedding store of float32.

The store is planned and written shard by shard, as in stage 1: a stopped evaluation goes on where it was, and
`dimefm info` and `dimefm verify` can read it. Shapes: N images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import EmbeddingStore, Failure, SchemaError, SourceSummary, Status, TeacherIdentity, digest_of
from cache_schemas.embedding_store import CpuDecoder
from cache_schemas.plan import IMAGE_PLAN
from dimefm.caching.crashing_images import running
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.image_loader import MEMORY_RAN_OUT
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import RUN_AGAIN, StoreError, UnreadableError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.parquet_tables import write_plan
from dimefm.system import storage
from dimefm.system.machine import cpus
from dimefm.system.progress import Progress

_SMALL, _SHARD_ROWS = 65_536, (256, 4096)  # rows per shard for a set of up to _SMALL images, and for a larger one


@dataclass(frozen=True)
class Features:
    """Unit-norm features of every image of a set. The rows of images that could not be read are zero."""

    store: Store

    def __len__(self) -> int:
        return self.store.schema.rows

    @property
    def readable(self) -> np.ndarray[Any, Any]:
        """Which images have features, bool (N,)."""
        readable: np.ndarray[Any, Any] = self.store.status() == Status.OK
        return readable

    def all(self) -> np.ndarray[Any, Any]:
        """float32 (N, D)."""
        return self.store.read(0, len(self)).astype(np.float32, copy=False)

    def take(self, rows_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """float32 (rows, D): the features of these rows."""
        return self.store.gather(rows_N).astype(np.float32, copy=False)

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray[Any, Any]]:
        """All features in order, float32 (up to `rows`, D) at a time."""
        for start in range(0, len(self), rows):
            yield self.store.read(start, min(start + rows, len(self))).astype(np.float32, copy=False)

    def failures(self) -> list[Failure]:
        """The images that have no features, each with the reason."""
        return [failure for commit in self.store.commits() for failure in self.store.failures(commit)]


def compute_features(
    clip: Clip,
    images: ImageSet,
    out: str,
    *,
    squash: bool = False,
    decoder: CpuDecoder = "pillow",
    batch_size: int = 64,
    threads: int | None = None,
    retry: bool = True,
) -> Features:
    """The features of `images` in a store at `out`, encoded now unless they were before.

    `squash` resizes without keeping the aspect ratio. `decoder` is "pillow" for exactly open_clip's pixels, or "fast"
    (see images.preprocess). With `retry`, images that may be readable by now are tried again (see `to_retry`). A store
    of other images, another model or other settings is made again.

    Raises UnreadableError for images of the set that cannot be read now, and StoreError if the store cannot be written.
    """
    schema = _schema(clip.identity, images, squash, decoder, batch_size)
    store = _open_same(out, schema) or _plan(out, schema, images)
    again = to_retry(store, images) if retry else set()
    pending = sorted(set(range(store.schema.shards)) - store.committed() | again)
    rows = [stop - start for start, stop in map(store.schema.shard_range, pending)]
    done = store.schema.rows - sum(rows)
    if pending:
        name = f"{images.name} {images.split}"
        # If the process died before, an image may have crashed it. All are then decoded in another process first: a
        # set is small.
        with running(store.path) as died, Progress(name, store.schema.rows, "image", done) as progress:
            for shard, count in zip(pending, rows, strict=True):
                seen = [done]

                def more(images: int, seen: list[int] = seen) -> None:
                    seen[0] += images
                    progress.at(seen[0])

                try:
                    work = retry_shard if shard in again else encode_shard
                    work(store, shard, clip, threads=threads or cpus(), progress=more, careful=died)
                except UnreadableError as error:
                    remedy = f"put the set back as it was, and {RUN_AGAIN}"
                    raise UnreadableError(f"{images.name}: {error.what}", remedy=remedy) from error
                done += count
    return Features(store)


def to_retry(store: Store, images: ImageSet, *, crashed: bool = True) -> set[int]:
    """The finished shards with images that failed because of the state of the machine, not because of what they are:

    - they existed when the set was opened, and yet are MISSING: earlier versions left images out while the storage did
      not answer;
    - memory ran out while they were decoded;
    - with `crashed`, they ended the process. Each command tries these once more. `--skip-existing` does not: a set with
      an image that crashes every time could never be skipped.
    """

    def momentary(failure: Failure) -> bool:
        if failure.status == Status.MISSING.name:
            return images.samples[failure.row].size > 0
        return failure.reason.startswith(MEMORY_RAN_OUT) or (crashed and failure.status == Status.CRASHED.name)

    return {commit.shard for commit in store.commits() if any(map(momentary, store.failures(commit)))}


def _schema(
    model: TeacherIdentity, images: ImageSet, squash: bool, decoder: CpuDecoder, batch_size: int
) -> EmbeddingStore:
    if squash:
        model = replace(model, preprocessing=replace(model.preprocessing, resize_mode="squash"))
    files = [(file.path, file.size, file.modified) for file in images.files]
    shard_rows = _SHARD_ROWS[len(images.samples) > _SMALL]
    return EmbeddingStore(
        kind="image",
        rows=len(images.samples),
        dim=model.embed_dim,
        chunk_rows=shard_rows,
        shard_rows=shard_rows,
        batch_size=batch_size,
        teacher=model,
        source=SourceSummary(
            arguments=(images.where,),
            files=len(files),
            bytes=sum(max(0, sample.size) for sample in images.samples),
            digest=digest_of([images.digest(), files]),
            repeated_keys=0,
            problems=(),
        ),
        dtype="float32",
        decoder=decoder,
    )


def _open_same(out: str, schema: EmbeddingStore) -> Store | None:
    """The store at `out` if it has exactly this schema. Anything else is removed, since it can be made again."""
    try:
        store = Store(out)
        same = replace(store.schema, digests={}, teacher=schema.teacher) == schema
        if same and not schema.teacher.differences(store.schema.teacher):
            return store
    except (StoreError, SchemaError):
        pass
    storage.remove_folder(out)
    return None


def _plan(out: str, schema: EmbeddingStore, images: ImageSet) -> Store:
    digests = []
    for shard in range(schema.shards):
        start, stop = schema.shard_range(shard)
        samples = images.samples[start:stop]
        columns = {name: [getattr(s, name) for s in samples] for name in ("key", "file", "offset", "size")}
        table = pa.table({"row": np.arange(start, stop), **columns}, schema=IMAGE_PLAN)
        digests.append(write_plan(out, shard, table))
    return create_store(out, schema, digests, images.files)
