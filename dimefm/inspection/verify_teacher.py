"""`dimefm verify --sample`: encode rows of a store again with its teacher, and compare.

Shapes: N rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import Status
from dimefm.errors import MismatchError
from dimefm.inspection.verification import Verification
from dimefm.store.embedding_store import Store
from dimefm.system.wording import counted

if TYPE_CHECKING:
    from dimefm.inspection.verify import VerifyConfig

_SAME = 0.999  # the least cosine of a row that is encoded again


def check_teacher(parts: list[tuple[Store, Verification]], config: VerifyConfig) -> None:
    """Encode rows of a store, and of what was added to it, again, spread over the good shards: the cosine of each to
    what is stored must be near 1. Each part has its own report."""
    from dimefm.caching.canary import compare_again  # these import torch
    from dimefm.models.clip import load_clip, require_teacher
    from dimefm.models.hub import require_cached

    assert config.sample is not None
    store, report = parts[0]
    chosen = [_choose(*part, config.sample) for part in parts]
    if not any(map(len, chosen)):
        return
    known = store.schema.teacher
    name, tag = config.teacher or known.name, config.pretrained if config.teacher else known.pretrained
    if not config.teacher:
        require_cached(name, store.path)
    clip = load_clip(name, tag, known=known, precision=known.precision)
    try:
        require_teacher(clip, known, "the store", remedy="name it with --teacher and --pretrained")
    except MismatchError as error:
        report.faults.append(error.what)
        return
    for (part, found), rows_N in zip(parts, chosen, strict=True):
        if len(rows_N):
            _note(part, compare_again(part, clip, rows_N), found)


def _choose(store: Store, report: Verification, sample: int) -> np.ndarray[Any, Any]:
    """At most `sample` rows that have an embedding, spread over the good shards, int64 (N,)."""
    shards = [shard for shard in sorted(store.committed()) if shard not in report.bad]
    ranges = [np.arange(*store.schema.shard_range(shard)) for shard in shards]
    rows = np.concatenate([r[store.status(r[0], r[-1] + 1) == Status.OK] for r in ranges] or [np.empty(0, np.int64)])
    return np.unique(rows[np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(np.int64)])


def _note(store: Store, found: list[tuple[int, str, float]], report: Verification) -> None:
    gone = [one for one in found if math.isnan(one[2])]
    read = [one for one in found if not math.isnan(one[2])]
    if gone:
        row, key, _ = gone[0]
        report.notes.append(
            f"{len(gone):,} of {counted(len(found), 'row')} can no longer be read, such as row {row} ({key})"
        )
    if read:
        row, key, cosine = min(read, key=lambda one: one[2])
        least = f"least cosine to what is stored {cosine:.6f}, row {row} ({key})"
        report.notes.append(f"{counted(len(read), 'row')} encoded again: {least}")
    for row, key, cosine in found:
        if cosine < _SAME:
            problem = f"row {row} ({key}) encoded again has cosine {cosine:.4f} to what is stored"
            report.bad.setdefault(row // store.schema.shard_rows, []).append(problem)
