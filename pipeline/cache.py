"""`cache-images` and `cache-texts` as one call: load the teacher, plan the rows, encode them here or on Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from cache_schemas import EmbeddingStore, ViewPlan
from cache_schemas.embedding_store import Decoder, Kind
from cache_schemas.identity import Precision
from dimefm.caching.crashing_images import running
from dimefm.caching.plan import PlanRequest, forecast, open_or_plan, what_limit_left
from dimefm.caching.same_command import arguments_there, require_no_stranger
from dimefm.caching.sentences import SentenceRules
from dimefm.caching.speed import PROBE_ROWS, measure, one_thread, teacher_seconds
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
from dimefm.system.machine import choose_device
from dimefm.system.named_paths import allowed, allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.stopping import GOES_ON, holding
from pipeline.show_forecast import show_forecast
from pipeline.workers import choose_workers, require_cores

BATCH_SIZE = {"cpu": 32, "cuda": 512}


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
    """Column of the tables, or field of the tars, to read. Default: the one that fits; of sentences the first of text,
    caption, sentence, TEXT and title."""
    min_words: int | None = None
    """Leave out sentences with fewer words. In languages without spaces a few letters count as one word."""
    max_words: int | None = None
    """Leave out sentences with more words."""
    limit: int | None = None
    """Use only the first this many rows, in the order of the sources, and read no further. Shuffling comes after."""
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
    """Number of teachers that run at once, at most one per core; one alone needs no Ray. Default: by cores or GPUs,
    memory, and whether the work is worth the start."""
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
    request, teacher = _request(config, device, loaded), loaded.identity
    with writing(config.out, of_use=lambda files: is_planned(config.out)) as lease:
        planned = is_planned(config.out)
        store = open_or_plan(request, config.out, teacher, accept_missing=config.accept_missing)
        if not planned:
            _report_unused(store.schema)
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
        finished = len(store.committed()) == store.schema.shards
        if finished and not config.retry_failed:
            require_embeddings(store)
            return store
        failed = sum(pending_shards(store, retry=True).values()) if finished else 0
        workers = config.workers or _worth_starting(store, device, loaded)
        clip: Clip | None = loaded
        del loaded
        with holding(lambda: _kept(store, config.out)), running(store.path) as died:
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


def _worth_starting(store: Store, device: str, clip: Clip) -> int:
    """The number of workers for what is not finished, where none is asked for."""
    schema, pending = store.schema, pending_shards(store, retry=False) or pending_shards(store, retry=True)
    images = sum(pending.values()) * (schema.views.count if schema.views else 1)
    return choose_workers(
        device,
        shards=len(pending),
        weight_bytes=clip.weight_bytes(),
        seconds=lambda: images * teacher_seconds(schema.kind, clip),
    )


def _kept(store: Store, out: str) -> str:
    return f"{len(store.committed())} of {store.schema.shards} shards are kept in {out}; {GOES_ON}"


def _report_unused(schema: EmbeddingStore) -> None:
    """Print what is not used, before the rest is encoded for hours."""
    source = schema.source
    if unread := what_limit_left(schema):
        note(unread)
    for one in source.skipped:
        note(f"skipped: {describe_skipped(one)}")  # the result says it again
    for problem in first_lines(source.problems):
        say(f"problem: {line(problem)}", err=True)


def dry_run(config: CacheConfig) -> str:
    """What `cache` would do, as text: rows, shards and bytes, the teacher's identity, and the hours that it would take
    by the speed that was measured on the first rows. Writes nothing."""
    device = _device(config)
    began = time.monotonic()
    clip = _load(config, device, device)
    seconds = time.monotonic() - began
    request = _request(config, device, clip)
    if config.compile:
        clip.compile(request.batch_size)
    found = forecast(request, clip.identity, keep=PROBE_ROWS)
    with one_thread(), allowing(paths_of(config.sources)):
        rates = measure(found.first, found.schema, clip, accept_missing=config.accept_missing)
    workers = config.workers or choose_workers(
        device,
        shards=found.schema.shards,
        weight_bytes=clip.weight_bytes(),
        seconds=lambda: found.schema.rows / rates.of_worker(1, shared=True),
    )
    remote = config.ray_address is not None
    return show_forecast(
        found, rates, device=device, workers=workers, threads=config.threads, remote=remote, load=seconds
    )


def _device(config: CacheConfig) -> str:
    """The device to encode on: the one that was asked for, else the best one here.

    Raises DimefmError for sources that do not exist, and for options that do not fit the device or each other: before a
    large teacher is loaded.
    """
    require_name(config.out, "a store", ".zarr")
    _require_sources(config)
    if config.ray_address is None:
        require_cores(config.workers)
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
        limit=config.limit,
    )
