"""The job of cache-images and cache-texts: load the teacher, plan the rows, encode them here or on Ray."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

from cache_schemas import EmbeddingStore
from dimefm.caching.add_views import stores_to_write
from dimefm.caching.align_captions import align_captions
from dimefm.caching.crashing_images import running
from dimefm.caching.plan import PlanRequest, forecast, open_or_plan, what_limit_left
from dimefm.caching.planned_captions import PlannedCaptions
from dimefm.caching.sentences import SentenceRules
from dimefm.caching.speed import PROBE_ROWS, measure, one_thread, teacher_seconds
from dimefm.caching.worker import Job, pending_shards, run_here
from dimefm.errors import DimefmError, StoreError
from dimefm.models.clip import Clip, load_clip, teacher_precision
from dimefm.models.tokenizer import canonical, cuts
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.sources.base import paths_of
from dimefm.store.embedding_store import Store
from dimefm.store.failures import as_list, listed, require_embeddings
from dimefm.store.output_folder import is_planned
from dimefm.system.inert_text import line, say
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device
from dimefm.system.named_paths import allowed, allowing
from dimefm.system.notes import note
from dimefm.system.stopping import GOES_ON, holding
from pipeline.cache import CacheConfig, captions_place, earlier_schema, view_plan
from pipeline.show_forecast import show_forecast
from pipeline.workers import choose_workers

BATCH_SIZE = {"cpu": 32, "cuda": 512}


def run_job(config: CacheConfig) -> Store:
    """Do what `pipeline.cache.cache` does, once it has looked at all that is named."""
    store, _ = _run(config)
    if config.captions is not None:
        _run_captions(config, store)
    return store


def _run_captions(config: CacheConfig, images: Store) -> None:
    """Cache the captions in the plan of a finished image store, and write whose they are."""
    texts = CacheConfig(
        kind="text",
        sources=(PlannedCaptions(images),),
        out=captions_place(config),
        teacher=config.teacher,
        pretrained=config.pretrained,
        trained=config.trained,
        precision=config.precision or images.schema.teacher.precision,
        device=config.device,
        batch_size=config.batch_size,
        workers=config.workers,
        ray_address=config.ray_address,
    )
    note(f"{texts.out}: the captions of these images ...")
    store, request = _run(texts)
    with holding(lambda: f"{store.path} is kept; {GOES_ON}"):
        align_captions(images, store, request.canonical)


def _run(config: CacheConfig) -> tuple[Store, PlanRequest]:
    """The finished store of images or sentences, and how it was planned."""
    device = _device(config)
    loaded = _load(config, device, "cpu")
    request, teacher = _request(config, device, loaded), loaded.identity
    with writing(config.out, of_use=lambda files: is_planned(config.out)) as lease:
        planned = is_planned(config.out)
        store = open_or_plan(request, config.out, teacher, accept_missing=config.accept_missing)
        if not planned:
            _report_unused(store.schema)
        parts = stores_to_write(store, request.views)
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
        finished = all(len(part.committed()) == part.schema.shards for part in parts)
        if finished and not config.retry_failed:
            require_embeddings(store)
            return store, request
        failed = sum(pending_shards(parts[0], retry=True).values()) if finished else 0
        workers = config.workers or _worth_starting(parts, config, device, loaded)
        clip: Clip | None = loaded
        del loaded
        with holding(lambda: _kept(parts, config.out)), running(store.path) as died:
            # An image may have crashed the last run. On Ray it ends only a worker, and another one goes on.
            may_run_here = config.ray_address is None and not (died and config.kind == "image")
            retries = (False, True) if config.retry_failed else (False,)
            for part, retry in product(parts, retries):
                each = replace(job, store=part.path, retry=retry)
                shards = len(pending_shards(part, retry=retry))
                if may_run_here and min(workers, shards) <= 1:
                    clip = clip or _load(config, device, device)
                    run_here(each, clip)
                else:
                    from pipeline.ray_workers import run_shards  # imports Ray

                    clip = None  # the workers need the memory for their own
                    run_shards(each, workers=workers, address=config.ray_address)
        store = Store(store.path)
        require_embeddings(store)
        if failed and not config.accept_missing and failed == sum(pending_shards(parts[0], retry=True).values()):
            what = f"{store.path}: none of the {failed:,} rows that had failed could be mended{as_list(store)}"
            raise StoreError(what, remedy=f"mend the files first; {listed(store)}")
    return store, request


def _worth_starting(parts: list[Store], config: CacheConfig, device: str, clip: Clip) -> int:
    """The number of workers for what is not finished, where none is asked for."""
    shards, images = 0, 0
    for part in parts:
        pending = pending_shards(part, retry=False) or pending_shards(part, retry=config.retry_failed)
        images += sum(pending.values()) * (part.schema.views.count if part.schema.views else 1)
        shards = max(shards, len(pending))
    return choose_workers(
        device,
        shards=shards,
        weight_bytes=clip.weight_bytes(),
        seconds=lambda: images * teacher_seconds(config.kind, clip),
    )


def _kept(parts: list[Store], out: str) -> str:
    done, shards = sum(len(part.committed()) for part in parts), sum(part.schema.shards for part in parts)
    what = f"{done} of {shards} shards are kept" if done else "the plan is kept"
    return f"{what} in {out}; {GOES_ON}"


def _report_unused(schema: EmbeddingStore) -> None:
    """Print what is not used, before the rest is encoded for hours."""
    source = schema.source
    if unread := what_limit_left(schema):
        note(unread)
    for one in source.skipped:
        note(f"skipped: {describe_skipped(one)}")  # the result says it again
    for problem in first_lines(source.problems):
        say(f"problem: {line(problem)}", err=True)


def foresee(config: CacheConfig) -> str:
    """What `pipeline.cache.dry_run` says, once it has looked at all that is named."""
    device = _device(config)
    began = time.monotonic()
    clip = _load(config, device, device)
    seconds = time.monotonic() - began
    request = _request(config, device, clip)
    if config.compile:
        clip.compile(request.batch_size)
    if begun := earlier_schema(config):
        request = _of_views_to_add(request, begun)
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
    caption_seconds = found.captions * teacher_seconds("text", clip) if found.captions else 0.0
    return show_forecast(
        found, rates, device=device, workers=workers, threads=config.threads, remote=remote, load=seconds,
        captions_out=captions_place(config) if config.captions else "", caption_seconds=caption_seconds,
    )  # fmt: skip


def _device(config: CacheConfig) -> str:
    """The device to encode on: the one that was asked for, else the best one here. Raises DimefmError for a decoder
    that it does not have."""
    remote = config.ray_address is not None
    device = config.device if remote and config.device else choose_device(config.device)
    if config.decoder == "nvjpeg" and device == "cpu":
        raise DimefmError("--decoder nvjpeg decodes on a GPU, and this is a CPU", remedy="give --decoder fast")
    return device


def _load(config: CacheConfig, device: str, place: str) -> Clip:
    """The teacher in this process's memory, on `place`, with the precision that workers on `device` will use."""
    begun = earlier_schema(config)
    known = begun.teacher if begun else None
    precision = config.precision or (known.precision if known else teacher_precision(device))
    return load_clip(
        config.teacher, config.pretrained, trained=config.trained, known=known, precision=precision, device=place
    )


def _request(config: CacheConfig, device: str, clip: Clip) -> PlanRequest:
    begun = earlier_schema(config)
    batch_size = begun.batch_size if begun else BATCH_SIZE[device.partition(":")[0]]
    return PlanRequest(
        kind=config.kind,
        arguments=config.sources,
        column=config.column,
        captions=config.captions,
        is_cut=cuts(clip.tokenizer) if config.captions else None,
        sentences=SentenceRules(min_words=config.min_words, max_words=config.max_words, shuffle=config.shuffle),
        canonical=canonical(clip.tokenizer),
        views=view_plan(config),
        pixels=config.pixels,
        decoder=config.decoder,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size or batch_size,
        limit=config.limit,
    )


def _of_views_to_add(request: PlanRequest, begun: EmbeddingStore) -> PlanRequest:
    """A request for more views than a store has as one for what would be added: those views, and no pixels."""
    own, asked = begun.views, request.views
    if own is None or asked is None or own.count >= asked.count or replace(asked, count=own.count) != own:
        return request
    return replace(request, views=replace(own, first=own.count, count=asked.count - own.count), pixels=None)
