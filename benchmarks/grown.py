"""Finished stores of tens of millions of rows, grown from the embeddings of a real one; synthetic, but of its shape.

A row is a real embedding, turned into more dimensions by a fixed rotation, plus a share of the difference of two other
real ones, plus a little noise in all dimensions. So rows are clustered as real sentences are, their spread has the
directions that real differences have, and images lie as far from sentences as they do. Every shard is drawn by its own
seed: the same bytes on every run.

Shapes: N rows of a shard, E width of the real store, D width of the grown one.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.plan_scale import TEACHER
from benchmarks.simulated import make_plans
from cache_schemas import Status
from cache_schemas.embedding_store import EMBEDDING, STATUS
from dimefm.store.embedding_store import Store
from dimefm.system.progress import Progress

_DIFFERENCE, _NOISE = 0.5, 0.25
_ROTATION_SEED = 20


def grow(
    real: str, path: Path, kind: Any, rows: int, dim: int, *, seed: int,
    change: Callable[[int, np.ndarray[Any, Any]], None] | None = None,
) -> Store:  # fmt: skip
    """A finished store of `rows` rows, `dim` wide, at `path`; what an earlier run left is gone on with. `change` may
    alter the embeddings (N, D) of each shard, of norm 1, before they are written."""
    source = Store(real)
    store = make_plans(path, kind, rows, replace(TEACHER, embed_dim=dim))
    pending = sorted(set(range(store.schema.shards)) - set(store.committed()))
    if not pending:
        return store
    every, real_RE = source.valid_rows(0, source.schema.rows)
    if dim < real_RE.shape[1]:
        raise click.ClickException(f"--dim {dim} is less than the {real_RE.shape[1]} of {real}")
    axes = np.random.default_rng(_ROTATION_SEED).standard_normal((dim, real_RE.shape[1]), dtype=np.float32)
    rotation_ED = np.linalg.qr(axes)[0].T.astype(np.float32)
    with Progress("growing", rows, kind) as bar:
        for shard in pending:
            start, stop = store.schema.shard_range(shard)
            rng = np.random.default_rng((seed, shard))
            one, two, three = rng.integers(0, len(every), (3, stop - start))
            mixed_NE = real_RE[one].astype(np.float32)
            mixed_NE += _DIFFERENCE * (real_RE[two].astype(np.float32) - real_RE[three].astype(np.float32))
            grown_ND = mixed_NE @ rotation_ED
            grown_ND += rng.standard_normal(grown_ND.shape, dtype=np.float32) * (_NOISE / dim**0.5)
            grown_ND /= np.linalg.norm(grown_ND, axis=1, keepdims=True)
            if change:
                change(shard, grown_ND)
            status_N = np.full(stop - start, Status.OK, np.uint8)
            arrays = {EMBEDDING: grown_ND.astype(np.float16), STATUS: status_N}
            store.write_shard(shard, arrays, (), device="none", seconds=0)
            bar.at(stop)
    return store
