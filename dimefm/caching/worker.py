"""One worker of stage 1: a teacher on a device, which encodes one shard after the other. Ray makes actors of it.

A job with one worker runs in the command's own process, without Ray: to start Ray, and the libraries a second time,
takes longer than many such jobs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch

from cache_schemas import Commit, EmbeddingStore, Status
from cache_schemas.identity import Precision
from cache_schemas.plan import planned_rows
from dimefm.caching.canary import check_canary
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.speed import PROBE_ROWS, measure, one_thread
from dimefm.errors import SourceError, TeacherError, UnreadableError
from dimefm.models.clip import Clip, load_clip, require_teacher
from dimefm.models.hub import cached_first
from dimefm.store.added_views import is_addition, parent_path
from dimefm.store.embedding_store import Store
from dimefm.store.failures import failed_counts, require_embeddings
from dimefm.system import storage
from dimefm.system.lease import writes_under
from dimefm.system.machine import cpus
from dimefm.system.named_paths import allow
from dimefm.system.progress import Progress

_LEAST_TRIED, _SHARE_TRIED = 4, 32
"""On a CPU decoding is measured on a part of a shard, and on that many rows at least: a small job is done soon."""
SHARDS_AT_ONCE = {"cpu": 1, "cuda": 2}
"""Shards that a worker has in progress, by kind of device: a GPU need not wait while one begins and another is
written."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know: the planned store, and how to load its teacher. `retry`: encode only the rows of
    finished shards that have no embedding. `accept_missing`: leave out images whose file is gone or may not be read.
    `lease`: the command's, for a store at a URL. `schemes`: URL schemes that the user allows the plan to name, besides
    those of object stores (see system.named_paths)."""

    store: str
    teacher: str
    pretrained: str | None
    precision: Precision
    device: str
    threads: int | None
    compile: bool = False
    retry: bool = False
    accept_missing: bool = False
    lease: str | None = None
    schemes: str = ""


def _silent(rows: int) -> None:
    pass


class Worker:
    """One teacher on one device. A plain class: Ray makes actors of it, tests and benchmarks use it directly."""

    def __init__(self, job: Job, clip: Clip | None = None) -> None:
        """`clip` is the teacher if it is loaded already, on the job's device."""
        self._job, self._clip = job, clip
        self._turn, self._rows = threading.Lock(), dict[int, int]()

    def start(self, threads: int, shard: int, check: bool = False, careful: bool = False) -> str | None:
        """Load the teacher, and set the number of decoding threads, at most `threads`: as many as its speed needs,
        measured on rows of `shard`. Returns a message where a GPU needs more than that. With `check`, rows are encoded
        again first (see caching.canary). With `careful`, as after another process died, nothing is decoded for a
        measurement. This is not in __init__, because Ray would wrap the errors of that.

        Raises UnreadableError where none of these rows can be read here, as on a machine without the mount, or the
        teacher cannot be loaded here.

        The teacher itself computes on one thread on a CPU: sums come out differently on more, and a run that goes on
        with other workers must write the same bytes. Several workers of one thread are faster than one of several.
        """
        torch.set_num_threads(1)
        allow(self._job.schemes)
        job, self._store = self._job, Store(self._job.store, additions=0)
        writes_under(parent_path(self._store.path, self._store.schema), job.lease)
        schema = self._store.schema
        clip = self._clip
        if clip is None:
            clip = self._clip = _load(job, schema)
        require_teacher(clip, schema.teacher, job.store, remedy="name the teacher that the store was begun with")
        if job.compile:
            clip.compile(schema.batch_size)
        self._threads, note = threads, None
        on_gpu = clip.device.type == "cuda"
        with _named_memory(schema):
            decodes = not careful and schema.kind == "image" and schema.decoder != "nvjpeg"  # else threads only read
            if decodes and not job.retry and (on_gpu or (job.threads is None and threads > 1)):
                plan = self._store.plan(shard)
                tried = PROBE_ROWS if on_gpu else max(_LEAST_TRIED, min(PROBE_ROWS, len(plan) // _SHARE_TRIED))
                rows = planned_rows(plan.slice(0, tried))
                with suppress(SourceError):  # none of them is an image: there is no speed to go by
                    rates = measure(rows, schema, clip, accept_missing=job.accept_missing)
                    self._threads = job.threads or rates.threads(threads)
                    note = rates.bottleneck(self._threads) if on_gpu else None
            if check:
                check_canary(self._store, clip, accept_missing=job.accept_missing)
        return note

    def encode(self, shard: int, done: Callable[[int], None] = _silent, careful: bool = False) -> Commit:
        """Encode and commit one shard; `done` is called with the number of its rows that are done. Another thread may
        encode a second shard: while one has the teacher, the other reads and decodes its first rows, or writes its
        results. `careful`: see caching.encode_shard.

        Raises StoreError, with the shard kept, where every embedding so far is NaN or infinite: more of them would cost
        hours and be useless.
        """
        assert self._clip is not None, "start comes first"
        self._rows[shard] = 0

        def count(rows: int) -> None:
            self._rows[shard] += rows
            done(self._rows[shard])

        work = retry_shard if self._job.retry else encode_shard
        try:
            with _named_memory(self._store.schema):
                commit = work(
                    self._store,
                    shard,
                    self._clip,
                    threads=self._threads,
                    progress=count,
                    turn=self._turn,
                    accept_missing=self._job.accept_missing,
                    careful=careful,
                )
        finally:
            del self._rows[shard]
        if commit.counts.keys() == {Status.NOT_FINITE.name} and not self._store.contents.good:
            require_embeddings(self._store, remedy="look at the teacher, or give another --precision and --out")
        return commit

    def rows(self) -> dict[int, int]:
        """By shard in progress, how many of its rows are encoded."""
        return dict(self._rows)


def _load(job: Job, schema: EmbeddingStore) -> Clip:
    """The teacher, from this machine's cache if it is there. Raises UnreadableError where it cannot be loaded here, as
    on a machine that cannot reach the Hub: the command has loaded it, so other machines can."""
    load = partial(load_clip, known=schema.teacher, precision=job.precision, device=job.device)
    try:
        return cached_first(partial(load, job.teacher, job.pretrained))
    except TeacherError as error:
        raise UnreadableError(error.what, remedy=error.remedy) from error


@contextmanager
def _named_memory(schema: EmbeddingStore) -> Iterator[None]:
    """Around work on a GPU: full memory becomes an error with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"the GPU's memory does not hold batches of {schema.batch_size} {schema.kind}s beside what is in it"
        remedy = f"a new --out with --batch-size {max(1, schema.batch_size // 2)}; or fewer --workers, if they share it"
        raise TeacherError(what, remedy=remedy) from error


def pending_shards(store: Store, *, retry: bool) -> dict[int, int]:
    """The shards to do, and how many rows each has to do."""
    schema = store.schema
    if retry:
        failed = {c.shard: c.stop - c.start - c.counts.get(Status.OK.name, 0) for c in store.commits()}
        return {shard: count for shard, count in failed.items() if count}
    committed = store.committed()
    ranges = {shard: schema.shard_range(shard) for shard in range(schema.shards) if shard not in committed}
    return {shard: stop - start for shard, (start, stop) in ranges.items()}


def to_be_checked(store: Store) -> bool:
    """Whether rows are there already that those to come must fit: see caching.canary."""
    return bool(store.committed()) or is_addition(store.schema)


def run_here(job: Job, clip: Clip) -> None:
    """Do what `pipeline.ray_workers.run_shards` does with one worker, in this process, with a teacher that is loaded
    already. Raises what the worker raises; shards that were committed stay."""
    store = Store(job.store, additions=0)
    pending = pending_shards(store, retry=job.retry)
    if not pending:
        return
    storage.remove_leftovers(store.path)
    total, done = progress_of(store, pending, retry=job.retry)
    worker, order = Worker(job, clip.on(job.device)), sorted(pending)
    encoded, stopped, noted = dict[int, int](), threading.Event(), list[str]()

    def encode(shard: int) -> None:
        commit = worker.encode(shard, partial(show, shard))
        if shard != order[-1] and not noted and (note := none_usable(commit)):
            noted.append(note)
            progress.note(note)

    def show(shard: int, rows: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        encoded[shard] = rows
        progress.at(done + sum(encoded.values()))

    with one_thread(), Progress("encoding", total, store.schema.kind, done) as progress:
        note = worker.start(job.threads or cpus(), order[0], check=to_be_checked(store))
        if note:
            progress.note(note)
        _encode_each(encode, order, SHARDS_AT_ONCE[job.device.partition(":")[0]], stopped)


def _encode_each(encode: Callable[[int], None], shards: list[int], at_once: int, stopped: threading.Event) -> None:
    """Call `encode` for the shards in order, `at_once` at a time. After an error `stopped` is set, so that the shard
    beside the one that failed ends too."""
    if at_once == 1:
        for shard in shards:
            encode(shard)
        return
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for _ in pool.map(encode, shards):
                pass
        except BaseException:
            stopped.set()
            raise


def none_usable(commit: Commit) -> str | None:
    """A message for a shard in which every row failed, else None."""
    if Status.OK.name in commit.counts:
        return None
    counts = ", ".join(f"{status} {count:,}" for status, count in failed_counts(commit).items())
    return f"no row of shard {commit.shard} has an embedding ({counts}): dimefm info STORE says why, while this goes on"


class _StoppedError(Exception):
    """Ends a shard that another thread is encoding."""


def progress_of(store: Store, pending: dict[int, int], *, retry: bool) -> tuple[int, int]:
    """The number of rows in the job, and how many of them are done."""
    rows = sum(pending.values())
    return (rows, 0) if retry else (store.schema.rows, store.schema.rows - rows)
