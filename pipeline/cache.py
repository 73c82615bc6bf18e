"""`cache-images` and `cache-texts` as one call: load the teacher, plan the rows, encode them here or on Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cache_schemas import EmbeddingStore, SourceSummary, ViewPlan, to_plain
from cache_schemas.embedding_store import Decoder, Kind
from cache_schemas.identity import Precision
from dimefm.caching.crashing_images import running
from dimefm.caching.plan import Forecast, PlanRequest, forecast, open_or_plan
from dimefm.caching.same_command import arguments_there, require_no_stranger
from dimefm.caching.sentences import SentenceRules
from dimefm.caching.speed import PROBE_ROWS, Rates, measure
from dimefm.caching.worker import Job, pending_shards, run_here
from dimefm.errors import DimefmError, StoreError
from dimefm.models.clip import Clip, load_clip, teacher_precision
from dimefm.models.tokenizer import canonical
from dimefm.models.trained import Trained
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.sources.base import Source, paths_of
from dimefm.sources.files import expand
from dimefm.store.embedding_store import Store
from dimefm.store.failures import as_list, listed, require_embeddings
from dimefm.store.output_folder import is_planned
from dimefm.system.inert_text import line, say
from dimefm.system.lock import writing
from dimefm.system.machine import available_memory, choose_device, cpus
from dimefm.system.named_paths import allowed, allowing
from dimefm.system.notes import note
from dimefm.system.progress import amount, duration

BATCH_SIZE = {"cpu": 32, "cuda": 512}
_LEAST_WORK = {"image": 22e9, "text": 1.4e12}
"""Rows times bytes of the teacher's weights: about what one worker does in the time that Ray takes to start another."""
_WORKER_BYTES = 1_000_000_000  # memory of a worker beside the teacher's weights
_MEMORY_SHARE = 0.9  # part of the memory that all workers together may use


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """One job of stage 1: which images or sentences, which teacher, and how it runs. None: chosen by the machine or the
    source, or not asked for."""

    kind: Kind
    """What the sources hold: "image" or "text"."""
    sources: tuple[str | Source[Any], ...]
    """Files, globs of them, ranges such as {000..009}.tar, and folders, as local paths or URLs; or objects that follow
    the protocol `sources.base.Source`."""
    out: str
    """Store to write: a folder or URL, such as IMAGES.zarr or TEXTS.zarr."""
    teacher: str
    """Teacher, an open_clip model: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER."""
    pretrained: str | None = None
    """Weights of a plain NAME: an open_clip tag or a file."""
    trained: Trained | None = None
    """What weights in a file do not say of themselves: their preprocessing and activation."""
    column: str | None = None
    """Column of the tables, or field of the tars, to read. Default: the one that fits."""
    min_words: int | None = None
    """Leave out sentences with fewer words. In languages without spaces a few letters count as one word."""
    max_words: int | None = None
    """Leave out sentences with more words."""
    shuffle: int | None = None
    """Shuffle rows once with this seed, so that sequential reads are random samples. Default: no shuffling."""
    views: int | None = None
    """Cache this many random crops per image, instead of the whole image."""
    view_scale: float = 0.4
    """Smallest share of an image's area that a view shows."""
    view_seed: int = 0
    """Seed of the views."""
    pixels: int | None = None
    """Also keep each image as a JPEG whose short side has this many pixels, for train-student to read."""
    decoder: Decoder = "fast"
    """How images are decoded. pillow: exactly open_clip's pixels; fast: within 2 of 255 of them; nvjpeg: on the GPU,
    less near."""
    precision: Precision | None = None
    """Number format of the teacher's weights and matrix products. Default: fp32 on a CPU, fp16 on a GPU."""
    device: str | None = None
    """Where the teacher runs. Default: cuda if there is a GPU, else cpu."""
    compile: bool = False
    """Compile the image tower with torch.compile."""
    batch_size: int | None = None
    """Images or sentences per batch. Default: 32 on a CPU, 512 on a GPU."""
    shard_rows: int | None = None
    """Rows per shard, the unit of work: what was not finished when a run stopped is done again. Default: by the size of
    the input."""
    workers: int | None = None
    """Number of teachers that run at once; one alone needs no Ray. Default: by cores or GPUs, memory and rows."""
    threads: int | None = None
    """Decoding threads per worker. Default: as many as a measurement shows to be of use."""
    ray_address: str | None = None
    """Address of an existing Ray cluster; needs `workers`. Default: a local Ray for this command alone."""
    retry_failed: bool = False
    """Read the rows that have no embedding again, once the store is finished."""
    accept_missing: bool = False
    """Leave out images whose file is gone or refused since the store was planned. Default: stop."""


def cache(config: CacheConfig) -> Store:
    """Run the job to its end, or go on where an earlier run stopped. Returns the finished store.

    With `accept_missing`, images whose file is gone or refused since they were planned stay without an embedding;
    otherwise they raise UnreadableError. Raises StoreError if no row of the finished store has an embedding, or if
    `retry_failed` mended none of the rows that had failed, and other DimefmErrors that the user can mend. Shards that
    were committed stay.

    >>> cache(CacheConfig(kind="text", sources=("captions.txt",), out="texts.zarr", teacher="local-dir:teacher"))
    """
    with allowing(paths_of(config.sources)):
        return _cache(config)


def _cache(config: CacheConfig) -> Store:
    device = _device(config)
    require_no_stranger(config.out)  # before the lock is written into it
    loaded = _load(config, device, "cpu")
    request = _request(config, device, loaded)
    teacher, weight_bytes = loaded.identity, loaded.weight_bytes()
    clip: Clip | None = loaded
    del loaded
    with writing(config.out) as lease:
        planned = is_planned(config.out)
        store = open_or_plan(request, config.out, teacher, accept_missing=config.accept_missing)
        if not planned:
            _report_unused(store.schema.source)
        job = Job(
            store=store.path,
            teacher=teacher.name,
            pretrained=teacher.pretrained,
            precision=teacher.precision,
            device=device,
            threads=config.threads,
            compile=config.compile,
            accept_missing=config.accept_missing,
            lease=lease,
            schemes=allowed(),
        )
        workers = _workers(config, device, store.schema.rows, weight_bytes)
        finished = len(store.committed()) == store.schema.shards
        if finished and not config.retry_failed:
            require_embeddings(store)
            return store
        failed = sum(pending_shards(store, retry=True).values()) if finished else 0
        with running(store.path) as died:
            # An image may have crashed the last run. On Ray it ends only a worker, and another one goes on.
            may_run_here = config.ray_address is None and not (died and config.kind == "image")
            jobs = [job, replace(job, retry=True)] if config.retry_failed else [job]
            for each in jobs:
                shards = len(pending_shards(store, retry=each.retry))
                if may_run_here and min(workers, shards) <= 1:
                    clip = clip or _load(config, device, device)
                    run_here(each, clip)
                else:
                    from pipeline.ray_workers import run_shards  # imports Ray

                    clip = None  # the workers need the memory for their own
                    run_shards(each, workers=workers, address=config.ray_address)
        require_embeddings(store)
        if failed and not config.accept_missing and failed == sum(pending_shards(store, retry=True).values()):
            what = f"{store.path}: none of the {failed:,} rows that had failed could be mended{as_list(store)}"
            raise StoreError(what, remedy=f"mend the files first; {listed(store)}")
    return store


def _report_unused(source: SourceSummary) -> None:
    """Print what is not used, before the rest is encoded for hours."""
    for one in source.skipped:
        note(f"skipped: {describe_skipped(one)}")  # the result says it again
    for problem in first_lines(source.problems):
        say(f"problem: {line(problem)}", err=True)


def dry_run(config: CacheConfig) -> str:
    """What `cache` would do, as text: rows, shards and bytes, the teacher's identity, and the hours that it would take
    by the speed that was measured on the first rows. Writes nothing."""
    device = _device(config)
    clip = _load(config, device, device)
    request = _request(config, device, clip)
    if config.compile:
        clip.compile(request.batch_size)
    found = forecast(request, clip.identity, keep=PROBE_ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with allowing(paths_of(config.sources)):
            rates = measure(found.first, found.schema, clip, accept_missing=config.accept_missing)
    finally:
        torch.set_num_threads(threads)
    return _show_forecast(config, device, found, clip, rates)


def _show_forecast(config: CacheConfig, device: str, found: Forecast, clip: Clip, rates: Rates) -> str:
    source, workers = found.schema.source, _workers(config, device, found.schema.rows, clip.weight_bytes())
    on_cpu = device == "cpu"
    threads = config.threads or rates.threads(max(1, cpus() // workers))
    rate = workers * rates.of_worker(threads, shared=on_cpu)
    decodes = config.kind == "image" and config.decoder != "nvjpeg"
    bound = rates.bottleneck(threads) if decodes and not on_cpu else None
    jpegs = f" and {amount(found.schema.rows * rates.jpeg_bytes)} of JPEGs" if rates.jpeg_bytes else ""
    measured = f"{rates.teacher:,.0f} {config.kind}s/s by the teacher on one {'core' if on_cpu else 'GPU'}"
    who = f"{workers} workers"
    if config.kind == "image":
        measured = f"{rates.load:,.0f} images/s read and decoded by a thread, {measured}"
        who += f" of {threads} decoding threads"
    lines = [
        f"rows      {found.schema.rows:,} from {source.files:,} files, {amount(source.bytes)} to read",
        f"shards    {found.schema.shards:,}",
        f"writes    {amount(found.bytes_out)} of embeddings and status{jpegs}",
        f"measured  {measured}",
        f"takes     {duration(found.schema.rows / rate)} at {rate:,.0f} {config.kind}s/s with {who}",
    ]
    if bound:
        lines.append(bound)
    lines += [f"skipped   {describe_skipped(one)}" for one in source.skipped]
    lines += [f"problem   {line(problem)}" for problem in first_lines(source.problems)]
    if rates.failed:
        lines.append(f"failed    {rates.failed}")
    lines.append("teacher")
    lines += [f"  {name:<15} {value}" for name, value in to_plain(clip.identity).items()]
    return "\n".join(lines)


def _device(config: CacheConfig) -> str:
    """The device to encode on: the one that was asked for, else the best one here.

    Raises DimefmError for sources that do not exist, and for options that do not fit the device or each other: before a
    large teacher is loaded.
    """
    _require_sources(config)
    remote = config.ray_address is not None
    if remote and config.workers is None:
        what = "--ray-address without --workers"
        raise DimefmError(what, remedy="give --workers: how many of the cluster's GPUs or cores to use")
    device = config.device if remote and config.device else choose_device(config.device)
    if config.decoder == "nvjpeg":
        if device == "cpu":
            raise DimefmError("--decoder nvjpeg decodes on a GPU, and this is a CPU", remedy="give --decoder fast")
        if config.views or config.pixels:
            what = "--decoder nvjpeg goes with neither --views nor --pixels, which are made on the CPU"
            raise DimefmError(what, remedy="give --decoder fast")
    return device


def _require_sources(config: CacheConfig) -> None:
    if config.accept_missing:
        arguments_there(config.out, config.sources)
        return
    for argument in paths_of(config.sources):
        expand(argument)


def _load(config: CacheConfig, device: str, place: str) -> Clip:
    """The teacher in this process's memory, on `place`, with the precision that workers on `device` will use."""
    begun = _earlier_schema(config)
    known = begun.teacher if begun else None
    precision = config.precision or (known.precision if known else teacher_precision(device))
    return load_clip(
        config.teacher, config.pretrained, trained=config.trained, known=known, precision=precision, device=place
    )


def _earlier_schema(config: CacheConfig) -> EmbeddingStore | None:
    """The schema of the store that an earlier run began, if there is one: the store keeps its precision and batch size
    on any machine."""
    return Store(config.out).schema if is_planned(config.out) else None


def _workers(config: CacheConfig, device: str, rows: int, weight_bytes: int) -> int:
    """The number of workers. On a CPU: one per core, as far as there is memory for a teacher in each, and as there are
    enough rows to be worth the start of another worker. On GPUs: one per GPU."""
    if config.workers:
        return config.workers
    if device == "cpu":
        fit = int(_MEMORY_SHARE * available_memory()) // (_WORKER_BYTES + weight_bytes)
        worth = math.ceil(rows * weight_bytes / _LEAST_WORK[config.kind])
        return max(1, min(cpus(), fit, worth))
    return torch.cuda.device_count()


def _request(config: CacheConfig, device: str, clip: Clip) -> PlanRequest:
    begun = _earlier_schema(config)
    batch_size = begun.batch_size if begun else BATCH_SIZE[device.partition(":")[0]]
    views = None
    if config.views:
        views = ViewPlan(count=config.views, seed=config.view_seed, crop_scale=(config.view_scale, 1.0), flip=True)
    return PlanRequest(
        kind=config.kind,
        arguments=config.sources,
        column=config.column,
        sentences=SentenceRules(min_words=config.min_words, max_words=config.max_words, shuffle=config.shuffle),
        canonical=canonical(clip.tokenizer),
        views=views,
        pixels=config.pixels,
        decoder=config.decoder,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size or batch_size,
    )
