"""The work of one shard, as a plain function: plan slice in, committed shard out. Runs with or without Ray.

Shapes: B images or sentences in a batch, N rows of the shard, D embedding width, H height, W width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cache_schemas import Commit, Failure, Status
from dimefm import storage
from dimefm.clip import Clip
from dimefm.decode import DecodeError
from dimefm.errors import MismatchError, StoreError
from dimefm.preprocess import Preprocess
from dimefm.store import Store

_CANARY_ROWS, _CANARY_COSINE = 8, 0.999
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_WAITS = (0.5, 2.0)  # seconds before a failed read is tried again


def encode_shard(
    store: Store, shard: int, clip: Clip, *, threads: int = 1, progress: Callable[[int], None] = lambda rows: None
) -> Commit:
    """Encode every row of `shard` and commit it. `progress` is told how many more rows are done, as they are."""
    began = time.monotonic()
    rows, schema = store.plan(shard).to_pylist(), store.schema
    embedding_ND, status_N, reasons = encode_rows(rows, schema.kind, clip, schema.batch_size, threads, progress)
    failures = [
        Failure(
            row=row["row"],
            key=row["key"],
            file=row.get("file", ""),
            status=Status(status_N[i]).name,
            reason=reasons[i],
        )
        for i, row in enumerate(rows)
        if status_N[i] != Status.OK
    ]
    device, seconds = str(clip.device), time.monotonic() - began
    return store.write_shard(shard, embedding_ND, status_N, failures, device=device, seconds=seconds)


def encode_rows(
    rows: list[dict[str, Any]],
    kind: str,
    clip: Clip,
    batch_size: int,
    threads: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[int, str]]:
    """Embeddings float16 (N, D), zero where there is none; status uint8 (N,); the reason of each failed row."""
    embedding_ND = np.zeros((len(rows), clip.identity.embed_dim), np.float16)
    status_N = np.zeros(len(rows), np.uint8)
    reasons: dict[int, str] = {}
    batches = _image_batches(rows, clip, batch_size, threads, status_N, reasons)
    if kind == "text":
        batches = _text_batches(rows, clip, batch_size)
    done = 0
    for indices, features_BD in batches:
        finite_B = torch.isfinite(features_BD).all(dim=1) & (features_BD.norm(dim=1) > 0.5)
        values, good = features_BD.cpu().numpy().astype(np.float16), finite_B.cpu().numpy()
        for i, value, ok in zip(indices, values, good, strict=True):
            embedding_ND[i] = value if ok else 0
            status_N[i] = Status.OK if ok else Status.NOT_FINITE
            if not ok:
                reasons[i] = "the teacher's embedding is NaN, infinite or zero"
        progress(indices[-1] + 1 - done)
        done = indices[-1] + 1
    progress(len(rows) - done)
    return embedding_ND, status_N, reasons


_Batches = Iterator[tuple[list[int], torch.Tensor]]


def _text_batches(rows: list[dict[str, Any]], clip: Clip, batch_size: int) -> _Batches:
    for start in range(0, len(rows), batch_size):
        indices = list(range(start, min(start + batch_size, len(rows))))
        yield indices, clip.encode_texts([rows[i]["text"] for i in indices])


def _image_batches(
    rows: list[dict[str, Any]],
    clip: Clip,
    batch_size: int,
    threads: int,
    status_N: np.ndarray[Any, Any],
    reasons: dict[int, str],
) -> _Batches:
    """Batches of decoded images through the teacher. Rows that cannot be read get their status and reason; which
    rows share a batch depends on the data alone, never on timing, so a second run gives the same bytes."""
    indices: list[int] = []
    pixels: list[torch.Tensor] = []
    for i, result in enumerate(_decoded(rows, Preprocess(clip.identity.preprocessing), threads, 2 * batch_size)):
        if isinstance(result, DecodeError):
            status_N[i], reasons[i] = result.status, str(result)
            continue
        indices.append(i)
        pixels.append(result)
        if len(indices) == batch_size:
            yield indices, clip.encode_images(torch.stack(pixels))
            indices, pixels = [], []
    if indices:
        yield indices, clip.encode_images(torch.stack(pixels))


def _decoded(
    rows: list[dict[str, Any]], preprocess: Preprocess, threads: int, ahead: int
) -> Iterator[torch.Tensor | DecodeError]:
    """Preprocessed images in order of row, decoded on threads at most `ahead` rows before they are needed."""
    waiting: deque[Future[torch.Tensor | DecodeError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            waiting.append(pool.submit(_load, row, preprocess))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load(row: dict[str, Any], preprocess: Preprocess) -> torch.Tensor | DecodeError:
    try:
        data = _read(row)
        if len(data) < row["size"]:
            return DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {row['size']:,} bytes")
        return preprocess(data)
    except _GONE as error:
        return DecodeError(Status.MISSING, str(error))
    except DecodeError as error:
        return error


def _read(row: dict[str, Any]) -> bytes:
    """The bytes of a sample. Storage that fails for the moment is asked again, and at last ends the job: a row is
    given up for good only where its file is gone."""
    for wait in (*_WAITS, None):
        try:
            return storage.read_bytes(row["file"], row["offset"], row["size"])
        except _GONE:
            raise
        except OSError as error:
            if wait is None:
                what = f"{row['file']} cannot be read: {error}"
                raise StoreError(what, remedy="run the same command again once the storage answers") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def check_canary(store: Store, clip: Clip) -> None:
    """Encode a few rows of a finished shard again. Raises MismatchError where they no longer agree: the files, the
    libraries or the device have changed since, and more rows would not belong with those that are there."""
    commit = next((c for c in store.commits() if c.counts.get(Status.OK.name)), None)
    if commit is None:
        return
    good = np.flatnonzero(store.status(commit.start, commit.stop) == Status.OK)[:_CANARY_ROWS]
    plan = store.plan(commit.shard).to_pylist()
    again_ND, status_N, _ = encode_rows([plan[i] for i in good], store.schema.kind, clip, len(good) or 1)
    kept_ND = store.gather(good + commit.start)
    cosine_N = (again_ND.astype(np.float32) * kept_ND.astype(np.float32)).sum(axis=1)
    for i, row in enumerate(good):
        if status_N[i] != Status.OK or cosine_N[i] < _CANARY_COSINE:
            name = f"{store.path}: row {commit.start + row} ({plan[row]['key']})"
            what = f"{name} encoded again has cosine {cosine_N[i]:.4f} to what is stored"
            remedy = "a file, a library or the device has changed since it was written; cache into a new --out"
            raise MismatchError(what, remedy=remedy)
