"""Makers of small stores with known content, without a teacher."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import (
    IMAGE_PLAN,
    TEXT_PLAN,
    EmbeddingStore,
    Failure,
    Preprocessing,
    SourceSummary,
    Status,
    TeacherIdentity,
)
from cache_schemas.embedding_store import rows_path
from dimefm.store.embedding_store import Store
from dimefm.store.parquet_tables import write_plan


def teacher_identity(**changes: Any) -> TeacherIdentity:
    """An identity that no model has, 16 wide."""
    fields: dict[str, Any] = {
        "name": "local-dir:/somewhere",
        "pretrained": None,
        "weights": "w",
        "activation": "gelu",
        "preprocessing": Preprocessing(
            size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest"
        ),
        "tokenizer": "SimpleTokenizer",
        "context_length": 77,
        "embed_dim": 16,
        "precision": "fp32",
        "logit_scale": 100.0,
        "logit_bias": None,
    }
    return TeacherIdentity(**(fields | changes))


def random_store(
    path: Path,
    *,
    rows: int,
    shard_rows: int,
    kind: Any = "image",
    failed: tuple[int, ...] = (),
    seed: int = 0,
    digest: str = "d",
    values: np.ndarray[Any, Any] | None = None,
    keys: Sequence[str] | None = None,
    dtype: Any = "float16",
    **teacher: Any,
) -> tuple[Store, np.ndarray[Any, Any]]:
    """A finished store of random unit vectors; rows in `failed` have none. The store, and the vectors as stored.

    `values` (rows, 16) instead of random ones, with their norms set to 1, or in `dtype` to be stored as they are;
    `keys` instead of k0, k1, ...
    """
    identity = teacher_identity(**teacher)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, identity.embed_dim)) if values is None else values
    if values.dtype != dtype:
        values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)
    status = np.full(rows, Status.OK, np.uint8)
    for row in failed:
        values[row], status[row] = 0, Status.UNDECODABLE
    schema = EmbeddingStore(
        kind=kind,
        rows=rows,
        dim=identity.embed_dim,
        chunk_rows=min(16, shard_rows),
        shard_rows=shard_rows,
        batch_size=8,
        teacher=identity,
        source=SourceSummary(arguments=("a",), files=1, bytes=1, digest=digest, repeated_keys=0, problems=()),
        dtype=dtype,
    )
    keys = keys or [f"k{row}" for row in range(rows)]
    digests = [
        write_plan(str(path), shard, _plan(kind, keys, *schema.shard_range(shard))) for shard in range(schema.shards)
    ]
    plans = {rows_path(shard): digest for shard, digest in enumerate(digests)}
    store = Store.create(str(path), dataclasses.replace(schema, digests=plans))
    for shard in range(schema.shards):
        start, stop = schema.shard_range(shard)
        failures = [
            Failure(row=row, key=f"k{row}", file="f", status="UNDECODABLE", reason="made so")
            for row in failed
            if start <= row < stop
        ]
        arrays = {"embedding": values[start:stop], "status": status[start:stop]}
        store.write_shard(shard, arrays, failures, device="cpu", seconds=1.0)
    return store, values


def _plan(kind: str, keys: Sequence[str], start: int, stop: int) -> pa.Table:
    rows = list(range(start, stop))
    columns: dict[str, list[Any]] = {"row": rows, "key": list(keys[start:stop])}
    if kind == "text":
        return pa.table({**columns, "text": [f"sentence {row}" for row in rows]}, schema=TEXT_PLAN)
    zeros = [0] * len(rows)
    return pa.table({**columns, "file": ["f"] * len(rows), "offset": zeros, "size": zeros}, schema=IMAGE_PLAN)


def brute_force(
    values: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], k: int, without: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The k rows of largest inner product for each query, best first, some rows left out."""
    scores = queries.astype(np.float32) @ values.astype(np.float32).T
    scores[:, list(without)] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
