"""`cache-images` and `cache-texts` as one call: load the teacher's identity, plan, run, report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from cache_schemas import TeacherIdentity
from dimefm.clip import Precision, load_clip
from dimefm.store import Store
from pipeline.plan import Forecast, PlanRequest, forecast, open_or_plan
from pipeline.runner import Job, run_shards

BATCH_SIZE = {"cpu": 32, "cuda": 512}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """One job of stage 1. None means: chosen by the machine (device, precision, workers, threads) or the source."""

    kind: Literal["image", "text"]
    sources: tuple[str, ...]
    out: str
    teacher: str
    pretrained: str | None = None
    precision: Precision | None = None
    device: str | None = None
    batch_size: int | None = None
    shard_rows: int | None = None
    workers: int | None = None
    threads: int | None = None
    ray_address: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished store, and its rows by status."""

    store: Store
    counts: dict[str, int]


def cache(config: CacheConfig) -> Outcome:
    """Run the job to its end, or go on with it where an earlier run stopped.

    Raises a DimefmError for whatever the user can mend; shards that were committed stay.
    """
    device = _device(config)
    teacher = load_clip(config.teacher, config.pretrained, precision=config.precision, device=_probe(device)).identity
    store = open_or_plan(_request(config, device), config.out, teacher)
    workers = config.workers or (torch.cuda.device_count() if device == "cuda" else _cpus())
    job = Job(
        store=store.path,
        teacher=config.teacher,
        pretrained=config.pretrained,
        precision=teacher.precision,
        device=device,
        threads=config.threads or max(1, _cpus() // workers),
    )
    run_shards(job, workers=workers, address=config.ray_address)
    counts: Counter[str] = Counter()
    for commit in store.commits():
        counts.update(commit.counts)
    return Outcome(store, dict(counts))


def dry_run(config: CacheConfig) -> tuple[Forecast, TeacherIdentity]:
    """What `cache` would do: rows, shards and bytes, and the teacher's identity. Writes nothing."""
    device = _device(config)
    teacher = load_clip(config.teacher, config.pretrained, precision=config.precision, device=_probe(device)).identity
    return forecast(_request(config, device), teacher.embed_dim), teacher


def _request(config: CacheConfig, device: str) -> PlanRequest:
    batch_size = config.batch_size or BATCH_SIZE[device.partition(":")[0]]
    return PlanRequest(
        kind=config.kind, arguments=config.sources, shard_rows=config.shard_rows, batch_size=batch_size
    )
