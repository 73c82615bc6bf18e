"""Finished stores of any size, without a teacher, on little disk.

Attributes, plans and commits are whole and real; the arrays of all shards but the last are one shard of random
embeddings under many names (hard links), and the plans name the members of a few real tars over and over. 40 million
rows take 0.7 GB, and are read from memory.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.plan_scale import TEACHER
from cache_schemas import EmbeddingStore, SourceSummary, Status, TeacherIdentity
from cache_schemas.embedding_store import EMBEDDING, STATUS, commit_path, rows_path
from cache_schemas.plan import PLANS
from dimefm.caching.plan import chunk_rows, shard_size
from dimefm.sources.account import Account
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.read_image import ImagePlace
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.output_folder import is_planned
from dimefm.store.parquet_tables import write_plan
from dimefm.system import storage

_NOWHERE = ImagePlace("nowhere.tar", 0, 1)  # where an image is that only has an embedding
_SHARDS = 64  # at least, as stage 1 cuts a source


def simulate(path: Path, kind: Any, rows: int, dim: int, tars: list[str], teacher: TeacherIdentity = TEACHER) -> None:
    """A finished store at `path`, as if by `teacher`, unless one of that size is there."""
    if is_planned(str(path)):
        store = Store(str(path))
        store.require_complete()
        if (store.schema.rows, store.schema.dim, store.schema.source.arguments) == (rows, dim, tuple(tars)):
            return
        raise click.ClickException(f"{path} is another simulation: delete it, or give another --folder")
    store = make_plans(path, kind, rows, replace(teacher, embed_dim=dim), tars)
    schema, digests = store.schema, store.schema.digests
    rng = np.random.default_rng(0)
    for shard in {0, schema.shards - 1}:
        start, stop = schema.shard_range(shard)
        values_ND = rng.standard_normal((stop - start, dim), dtype=np.float32)
        values_ND /= np.linalg.norm(values_ND, axis=1, keepdims=True)
        arrays: dict[str, np.ndarray[Any, Any]] = {
            EMBEDDING: values_ND.astype(np.float16),
            STATUS: np.full(stop - start, Status.OK, np.uint8),
        }
        store.write_shard(shard, arrays, (), device="none", seconds=0)
    first = store.commit(0)
    assert first
    for shard in range(1, schema.shards - 1):
        for name in (EMBEDDING, STATUS):
            target = path / store.shard_file(name, shard)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path / store.shard_file(name, 0), target)
        start, stop = schema.shard_range(shard)
        commit = replace(first, shard=shard, start=start, stop=stop, plan=digests[rows_path(shard)])
        storage.write_json(str(path / commit_path(shard)), commit.to_json())


def make_plans(path: Path, kind: Any, rows: int, teacher: TeacherIdentity, tars: Sequence[str] = ()) -> Store:
    """A store at `path` with whole plans and no shard, unless it is there."""
    if is_planned(str(path)):
        return Store(str(path))
    source = open_image_source(tars) if tars else None
    samples = list(source.samples(Account())) if source else []
    size = shard_size(rows // _SHARDS)
    summary = SourceSummary(
        arguments=tuple(tars), files=len(tars), bytes=0, digest="simulated", repeated_keys=0, problems=()
    )
    schema = EmbeddingStore(
        kind=kind, rows=rows, dim=teacher.embed_dim, chunk_rows=chunk_rows(size), shard_rows=size, batch_size=64,
        teacher=teacher, source=summary,
    )  # fmt: skip
    tables = (_plan(kind, *schema.shard_range(shard), samples) for shard in range(schema.shards))
    digests = [write_plan(str(path), shard, plan) for shard, plan in enumerate(tables)]
    return create_store(str(path), schema, digests, source.files() if source else [])


def _plan(kind: str, start: int, stop: int, samples: list[Any]) -> pa.Table:
    rows_N = np.arange(start, stop)
    keys = pc.utf8_lpad(pa.array(rows_N).cast(pa.string()), 9, "0")
    columns: dict[str, Any] = {"row": rows_N, "key": keys}
    if kind == "text":
        words = ("a photo of thing number ", keys, " beside another thing on a table")
        columns["text"] = pc.binary_join_element_wise(*words, "")
    else:
        chosen = [samples[row % len(samples)] if samples else _NOWHERE for row in rows_N.tolist()]
        columns |= {name: [getattr(sample, name) for sample in chosen] for name in ("file", "offset", "size")}
    return pa.table(columns, schema=PLANS[kind])
