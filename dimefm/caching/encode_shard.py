"""The work of one shard, as a plain function: plan slice in, committed shard out. Runs with or without Ray.

Shapes: N rows of the shard, B images or sentences in a batch, V views, D embedding width, H height, W width.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from cache_schemas import Commit, EmbeddingStore, Failure, Status
from cache_schemas.embedding_store import EMBEDDING, PIXEL_INDEX, STATUS, VIEW, pixels_path
from dimefm.caching.crashing_images import without_crashes
from dimefm.caching.gpu_image_loader import GpuLoader, open_loader
from dimefm.caching.image_loader import Loader
from dimefm.caching.lasting_failures import require_lasting
from dimefm.errors import RUN_AGAIN, MismatchError, StoreError, UnreadableError
from dimefm.images.decode import DecodeError
from dimefm.models.clip import Clip, token_counts
from dimefm.store.commit import remove_commit
from dimefm.store.embedding_store import Store
from dimefm.store.pixel_tar import PixelTar, pixel_tar
from dimefm.store.zarr_arrays import DAMAGED, digest_arrays
from dimefm.system import storage
from dimefm.system.transfer import Arriving, fetch

_CANARY_ROWS, _CANARY_COSINE = 8, 0.999
_ALONE = nullcontext()

Rows = list[dict[str, Any]]
Progress = Callable[[int], None]


def _silent(rows: int) -> None:
    pass


@dataclass
class ShardData:
    """What is written of a shard: the store's arrays by name, (N, ...), and why a row has no embedding. `waited`: the
    seconds in which another shard had the teacher."""

    arrays: dict[str, np.ndarray[Any, Any]]
    reasons: dict[int, str] = field(default_factory=dict)
    waited: float = 0.0

    @classmethod
    def empty(cls, rows: int, schema: EmbeddingStore) -> ShardData:
        """All rows pending."""
        return cls({name: np.zeros((rows, *spec.shape[1:]), spec.dtype) for name, spec in schema.arrays().items()})

    def failed(self) -> np.ndarray[Any, Any]:
        """The rows without an embedding."""
        return np.flatnonzero(self.arrays[STATUS] != Status.OK)

    def fail(self, row: int, status: Status, reason: str) -> None:
        """Leave a row without one."""
        self.arrays[STATUS][row], self.reasons[row] = status, reason


def encode_shard(
    store: Store,
    shard: int,
    clip: Clip,
    *,
    threads: int = 1,
    progress: Progress = _silent,
    turn: AbstractContextManager[Any] = _ALONE,
    accept_missing: bool = False,
    careful: bool = False,
) -> Commit:
    """Encode every row of `shard` and commit it. `progress` is told how many more rows are done, as they are.

    `turn` is held while the teacher works: of two shards on two threads one reads and decodes its first rows, or writes
    its results, while the other has the teacher. `accept_missing`: leave out the images whose file is gone or refused.
    With `careful`, as after a process was lost, images that crash their decoder are found first, at the price of
    decoding all twice (see caching.crashing_images). Raises UnreadableError where rows would be left out that
    caching.lasting_failures does not allow, or where the input does not answer, and StoreError where the shard cannot
    be written.
    """
    began, rows, digest = time.monotonic(), store.plan(shard).to_pylist(), None
    if careful and store.schema.kind == "image":
        rows = without_crashes(rows, store.schema, clip.device, threads)
    # What cannot be read becomes a status or a StoreError: an OSError that is left is of the writing.
    with storage.writing_to(store.path), ExitStack() as stack:
        tar = stack.enter_context(_tar(store, shard)) if store.schema.pixels else None
        words: dict[str, Any] = {"threads": threads, "progress": progress, "tar": tar, "turn": turn}
        data = encode_rows(rows, store.schema, clip, **words, accept_missing=accept_missing)
        _require_lasting(store, rows, data, accept_missing)
        digest = tar.finish() if tar else None
    return _commit(store, shard, rows, data, digest, clip, began)


def retry_shard(
    store: Store,
    shard: int,
    clip: Clip,
    *,
    threads: int = 1,
    progress: Progress = _silent,
    turn: AbstractContextManager[Any] = _ALONE,
    accept_missing: bool = False,
    careful: bool = False,
) -> Commit:
    """As `encode_shard`, but only for the rows of a finished shard that have no embedding; the others stay. Rows that
    crashed their decoder are always tried in a process of their own first."""
    began, rows, digest = time.monotonic(), store.plan(shard).to_pylist(), None
    commit = store.commit(shard)
    before = commit.seconds if commit else 0.0
    data = ShardData(store.shard_arrays(shard))
    if commit is not None and digest_arrays(*data.arrays.values()) != commit.digest:
        raise StoreError(f"{store.path}: the arrays of shard {shard} are not those that were committed", remedy=DAMAGED)
    failed = data.failed()
    with storage.writing_to(store.path), tempfile.TemporaryFile() as spool:
        tar = PixelTar(spool) if store.schema.pixels else None
        left = [rows[i] for i in failed]
        if store.schema.kind == "image" and (careful or (data.arrays[STATUS] == Status.CRASHED).any()):
            left = without_crashes(left, store.schema, clip.device, threads)
        words: dict[str, Any] = {"threads": threads, "progress": progress, "tar": tar, "turn": turn}
        again = encode_rows(left, store.schema, clip, **words, accept_missing=accept_missing)
        for name, values in again.arrays.items():
            data.arrays[name] = data.arrays[name].copy()
            data.arrays[name][failed] = values
        data.waited = again.waited
        data.reasons = {int(failed[place]): reason for place, reason in again.reasons.items()}
        _require_lasting(store, rows, data, accept_missing)
        if tar is not None:
            digest = _merge(store, shard, data, np.isin(np.arange(len(rows)), failed), spool)
    # The time of a shard is all that was spent on it.
    return _commit(store, shard, rows, data, digest, clip, began - before)


def encode_rows(
    rows: Rows,
    schema: EmbeddingStore,
    clip: Clip,
    *,
    threads: int = 1,
    progress: Progress = _silent,
    tar: PixelTar | None = None,
    turn: AbstractContextManager[Any] = _ALONE,
    accept_missing: bool = False,
) -> ShardData:
    """The shard's data of these rows of its plan. Which rows share a batch depends on the data alone, never on timing,
    so that a second run gives the same bytes. Rows that overflow float16 are computed again in float32. `turn`: see
    `encode_shard`."""
    data, wide, done = ShardData.empty(len(rows), schema), None, 0
    batches = _text_batches(rows, schema, clip)
    if schema.kind == "image":
        loader = open_loader(schema, clip.device, accept_missing=accept_missing)
        batches = _image_batches(rows, schema, clip, loader, threads, data, tar)
    with closing(batches):
        first, asked = list(islice(batches, 1)), time.monotonic()
        with turn:
            data.waited = time.monotonic() - asked
            for batch, arriving in _one_behind(chain(first, batches), schema, clip):
                left = _write(data, batch, arriving)
                if left.places and schema.teacher.precision == "fp16":
                    wide = wide or clip.in_float32()
                    left = _write(data, left, _send(left, schema, wide))
                for place in left.places:
                    data.fail(place, Status.NOT_FINITE, "the teacher's embedding is NaN, infinite or zero")
                progress(len(batch.places))
                done += len(batch.places)
    progress(len(rows) - done)
    return data


@dataclass(frozen=True)
class _Batch:
    """Some rows by their places in the shard, and what the teacher takes: pixels (B V, 3, H, W) or tokens (B, L)."""

    places: list[int]
    inputs: torch.Tensor


def _one_behind(batches: Iterator[_Batch], schema: EmbeddingStore, clip: Clip) -> Iterator[tuple[_Batch, Arriving]]:
    """Each batch with its results on their way, once the next one was sent to the teacher: on a GPU that works while
    results are fetched and written. A batch without rows passes, so that its pixels' place is used again in time."""
    before: tuple[_Batch, Arriving] | None = None
    for batch in batches:
        now = (batch, _send(batch, schema, clip)) if batch.places else None
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def _send(batch: _Batch, schema: EmbeddingStore, clip: Clip) -> Arriving:
    """Through the teacher: embeddings (B V, D) in the store's type, and whether each is one, bool (B V,)."""
    encode = clip.encode_images if schema.kind == "image" else clip.encode_tokens
    features_ND = encode(batch.inputs)
    good_N = torch.isfinite(features_ND).all(dim=1) & (features_ND.norm(dim=1) > 0.5)
    return fetch(features_ND.to(torch.float16 if schema.dtype == "float16" else torch.float32), good_N)


def _write(data: ShardData, batch: _Batch, arriving: Arriving) -> _Batch:
    """Put the results of a batch into the shard's data; what is left of the batch: the rows without an embedding."""
    values_ND, good_N = (tensor.numpy() for tensor in arriving.wait())
    good_BV = good_N.reshape(len(batch.places), -1)
    good_B, places_B = good_BV.all(axis=1), np.array(batch.places)
    embedding = data.arrays[EMBEDDING]
    embedding[places_B[good_B]] = values_ND.reshape(len(places_B), *embedding.shape[1:])[good_B]
    data.arrays[STATUS][places_B[good_B]] = Status.OK
    if good_B.all():
        return _Batch([], batch.inputs[:0])
    left_N = torch.from_numpy(np.repeat(~good_B, good_BV.shape[1]))
    return _Batch(places_B[~good_B].tolist(), batch.inputs[left_N])


def _text_batches(rows: Rows, schema: EmbeddingStore, clip: Clip) -> Generator[_Batch, None, None]:
    """Sentences of like length together, so that little of a batch is padding."""
    tokens_NL = clip.tokenize([row["text"] for row in rows])
    order = np.argsort(token_counts(tokens_NL), kind="stable")
    for at in range(0, len(rows), schema.batch_size):
        places = order[at : at + schema.batch_size]
        yield _Batch(places.tolist(), tokens_NL[torch.from_numpy(places)])


def _image_batches(
    rows: Rows,
    schema: EmbeddingStore,
    clip: Clip,
    loader: Loader | GpuLoader,
    threads: int,
    data: ShardData,
    tar: PixelTar | None,
) -> Generator[_Batch, None, None]:
    """Batches of decoded images. Rows that cannot be read get their status and reason here."""
    size, at = max(1, schema.batch_size // (schema.views.count if schema.views else 1)), 0
    for loaded, pixels_N3HW in loader.batches(rows, size, threads, pin=clip.device.type == "cuda"):
        places = []
        for place, one in enumerate(loaded, at):
            if isinstance(one, DecodeError):
                data.fail(place, one.status, str(one))
                continue
            if one.boxes_V5 is not None:
                data.arrays[VIEW][place] = one.boxes_V5
            if tar is not None and one.jpeg is not None:
                data.arrays[PIXEL_INDEX][place] = tar.add(rows[place]["row"], one.jpeg)
            places.append(place)
        yield _Batch(places, pixels_N3HW)
        at += len(loaded)


def _require_lasting(store: Store, rows: Rows, data: ShardData, accept_missing: bool) -> None:
    if store.schema.kind == "image":
        require_lasting(store, rows, data.arrays[STATUS], data.reasons, accept_missing=accept_missing)


def _commit(
    store: Store, shard: int, rows: Rows, data: ShardData, pixels: str | None, clip: Clip, began: float
) -> Commit:
    failures = [
        Failure(
            row=rows[i]["row"],
            key=rows[i]["key"],
            file=rows[i].get("file", ""),
            status=Status(data.arrays[STATUS][i]).name,
            reason=data.reasons[i],
        )
        for i in data.failed().tolist()
    ]
    device, seconds = str(clip.device), time.monotonic() - began - data.waited
    return store.write_shard(shard, data.arrays, failures, pixels=pixels, device=device, seconds=seconds)


@contextmanager
def _tar(store: Store, shard: int) -> Iterator[PixelTar]:
    """The shard's tar to write. The commit of one that was there before goes first: it names places in the old tar."""
    with pixel_tar(storage.join(store.path, pixels_path(shard))) as tar:
        yield tar
        remove_commit(store.path, shard)


def _merge(store: Store, shard: int, data: ShardData, failed_N: np.ndarray[Any, Any], spool: Any) -> str:
    """The shard's tar again: its JPEGs as they were, with those of the retried rows from `spool` in their places."""
    index_N3 = data.arrays[PIXEL_INDEX]
    first = store.schema.shard_range(shard)[0]
    with _tar(store, shard) as tar:
        kept = _kept(store, first + np.flatnonzero((index_N3[:, 1] > 0) & ~failed_N))
        for i in np.flatnonzero(index_N3[:, 1] > 0).tolist():
            if failed_N[i]:
                start, stop, _ = index_N3[i].tolist()
                spool.seek(start)
            index_N3[i] = tar.add(first + i, spool.read(stop - start) if failed_N[i] else next(kept))
        return tar.finish()


def _kept(store: Store, rows_N: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """The store's own JPEGs of rows, while a tar is written: what cannot be read is not what cannot be written."""
    try:
        yield from store.pixels(rows_N)
    except OSError as error:
        what = f"{error.filename or store.path} cannot be read: {error.strerror or error}"
        remedy = "check its permissions and that the storage answers, and run the same command again"
        raise StoreError(what, remedy=f"{remedy}; what was finished is kept") from error


def check_canary(store: Store, clip: Clip, *, accept_missing: bool = False) -> None:
    """Encode a few rows of a finished shard again. Raises MismatchError where they no longer agree: the files, the
    libraries or the device have changed since, and more rows would not belong with those that are there. Raises
    UnreadableError for one that can no longer be read, unless `accept_missing`."""
    commit = next((c for c in store.commits() if c.counts.get(Status.OK.name)), None)
    if commit is None:
        return
    good = np.flatnonzero(store.status(commit.start, commit.stop) == Status.OK)[:_CANARY_ROWS] + commit.start
    for row, key, cosine in compare_again(store, clip, good, accept_missing=accept_missing):
        if np.isnan(cosine):
            if accept_missing:
                continue
            what = f"{store.path}: row {row} ({key}) was read when it was cached, and cannot be read now"
            raise UnreadableError(what, remedy=f"put its file back, or mount what it is on, and {RUN_AGAIN}")
        if not cosine >= _CANARY_COSINE:
            what = f"{store.path}: row {row} ({key}) encoded again has cosine {cosine:.4f} to what is stored"
            remedy = "a file, a library or the device has changed since it was written; cache into a new --out"
            raise MismatchError(what, remedy=remedy)


def compare_again(
    store: Store, clip: Clip, rows_N: np.ndarray[Any, Any], *, accept_missing: bool = True
) -> list[tuple[int, str, float]]:
    """Rows encoded again: of each its number, its key, and the least cosine of its views to what is stored; NaN where
    it can no longer be read. Without `accept_missing`, one that is refused is an UnreadableError."""
    plan = store.samples(rows_N)
    data = encode_rows(plan, store.schema, clip, accept_missing=accept_missing)
    again = data.arrays[EMBEDDING].astype(np.float32)
    kept = store.embeddings(rows_N).astype(np.float32)
    norms = np.linalg.norm(again, axis=-1) * np.linalg.norm(kept, axis=-1)
    cosine_N = ((again * kept).sum(axis=-1) / np.where(norms > 0, norms, 1)).reshape(len(rows_N), -1).min(axis=1)
    cosine_N[data.failed()] = np.nan
    return [(int(row), entry["key"], float(c)) for row, entry, c in zip(rows_N, plan, cosine_N, strict=True)]
