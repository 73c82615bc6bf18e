"""`cache-images` and `cache-texts` as one call: load the teacher's identity, plan, run, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cache_schemas import TeacherIdentity, to_plain
from dimefm.clip import Precision, load_clip
from dimefm.device import choose_device
from dimefm.errors import DimefmError
from dimefm.progress import amount
from dimefm.sources.base import expand
from dimefm.store import Store
from pipeline.plan import Forecast, PlanRequest, forecast, open_or_plan
from pipeline.runner import Job, cpus, run_shards

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


def cache(config: CacheConfig) -> Store:
    """Run the job to its end, or go on with it where an earlier run stopped; the finished store.

    Raises a DimefmError for whatever the user can mend; shards that were committed stay.
    """
    device, teacher = _device_and_teacher(config)
    store = open_or_plan(_request(config, device), config.out, teacher)
    workers = config.workers or (torch.cuda.device_count() if device.startswith("cuda") else cpus())
    job = Job(
        store=store.path,
        teacher=teacher.name,
        pretrained=teacher.pretrained,
        precision=teacher.precision,
        device=device,
        threads=config.threads,
    )
    run_shards(job, workers=workers, address=config.ray_address)
    return store


def dry_run(config: CacheConfig) -> tuple[Forecast, TeacherIdentity]:
    """What `cache` would do: rows, shards and bytes, and the teacher's identity. Writes nothing."""
    device, teacher = _device_and_teacher(config)
    return forecast(_request(config, device), teacher.embed_dim), teacher


def show_forecast(found: Forecast, teacher: TeacherIdentity) -> str:
    """The lines of --dry-run."""
    source = found.source
    lines = [
        f"rows     {found.rows:,} from {source.files:,} files, {amount(source.bytes)} to read",
        f"shards   {found.shards:,}",
        f"writes   {amount(found.bytes_out)} of embeddings and status",
        *(f"dropped  {count:,} {reason}" for reason, count in source.dropped.items() if count),
        *(f"problem  {problem}" for problem in source.problems),
        "teacher",
    ]
    lines += [f"  {name:<15} {value}" for name, value in to_plain(teacher).items()]
    return "\n".join(lines)


def _device_and_teacher(config: CacheConfig) -> tuple[str, TeacherIdentity]:
    """Where the workers run, and who the teacher will be there; read off a copy in this process's memory."""
    for argument in config.sources:
        expand(argument)  # a mistyped path is found before a large teacher is loaded
    remote = config.ray_address is not None
    if remote and config.workers is None:
        raise DimefmError(
            "--ray-address without --workers", remedy="say how many of the cluster's GPUs or cores to use"
        )
    device = config.device if remote and config.device else choose_device(config.device)
    precision = config.precision or ("fp32" if device == "cpu" else "bf16")
    return device, load_clip(config.teacher, config.pretrained, precision=precision, device="cpu").identity


def _request(config: CacheConfig, device: str) -> PlanRequest:
    batch_size = config.batch_size or BATCH_SIZE[device.partition(":")[0]]
    return PlanRequest(kind=config.kind, arguments=config.sources, shard_rows=config.shard_rows, batch_size=batch_size)
