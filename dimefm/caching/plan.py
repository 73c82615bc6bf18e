"""Planning: decide which sample is which row before any work, or open the plan that an earlier run has made."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import EmbeddingStore, SourceSummary, TeacherIdentity, ViewPlan
from cache_schemas.embedding_store import ROWS, Decoder, Kind
from cache_schemas.plan import CAPTIONED_PLAN, CAPTIONS, PLANS, SourceFile, planned_rows
from dimefm.caching.repeats import as_array, repeats
from dimefm.caching.same_command import (
    Asked,
    arguments_there,
    require_no_stranger,
    require_same_command,
    source_digest,
    with_gone,
)
from dimefm.caching.sentences import SentenceRules, tidy
from dimefm.errors import SourceError
from dimefm.sources.account import Account, found_instead
from dimefm.sources.base import ImageSample, Source, names_of
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.prompts import PromptSet
from dimefm.sources.text_sources import open_text_source
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.output_folder import is_planned
from dimefm.store.parquet_tables import write_plan
from dimefm.system import storage
from dimefm.system.wording import counted

_LEAST_SHARD, _MOST_SHARD, _CHUNK = 512, 65536, 1024
_BYTES_PER_ROW = {"image": 16_000, "text": 40}  # a guess that only sets the order of magnitude of a shard


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan: the arguments that name the source, what to take from it, and how to cut the store into shards.
    With the teacher's `canonical`, a new plan leaves out sentences that become equal to others for the teacher, unless
    the source holds the prompts of a labelled set. With `limit` a new plan has that many rows at most, and reads no
    further. With `captions` (see sources.captions) the plan of images holds those of each; with `is_cut` the ones of
    which the teacher's tokenizer leaves the end out are counted."""

    kind: Kind
    arguments: tuple[str | Source[Any], ...]
    column: str | None = None
    captions: str | None = None
    is_cut: Callable[[str], bool] | None = None
    sentences: SentenceRules = field(default_factory=SentenceRules)
    canonical: Callable[[str], str] | None = None
    views: ViewPlan | None = None
    pixels: int | None = None
    decoder: Decoder = "fast"
    shard_rows: int | None = None
    batch_size: int = 64
    limit: int | None = None

    def settings(self) -> dict[str, object]:
        """The settings that, with the files, decide the rows."""
        found: dict[str, object] = {"column": self.column} if self.column else {}
        if self.limit:
            found["limit"] = self.limit
        if self.captions:
            found["captions"] = self.captions
        return {**found, **self.sentences.settings()} if self.kind == "text" else found


@dataclass
class _Tally:
    """What planning finds out besides the rows."""

    bytes: int = 0
    captions: int = 0
    account: Account = field(default_factory=Account)
    keys: array[int] = field(default_factory=lambda: array("q"))

    def repeated_keys(self) -> int:
        return sum(len(places) for places in repeats(as_array(self.keys)))


@dataclass(frozen=True)
class Forecast:
    """What a plan would hold, without writing it: the store's attributes, the bytes of its arrays, its first rows, the
    number of captions of its images."""

    schema: EmbeddingStore
    bytes_out: int
    first: list[Any]
    captions: int = 0


def open_or_plan(request: PlanRequest, out: str, teacher: TeacherIdentity, *, accept_missing: bool = False) -> Store:
    """The store at `out`: opened if the same command made it, perhaps with fewer views (caching.add_views), planned if
    there is none. With `accept_missing` it is
    opened although files of its source are gone, even files that the arguments name.

    Raises SourceError for an empty source, OutputExistsError where `out` holds something else, MismatchError where it
    holds a store of another source, teacher or setting, or one whose source has changed since.
    """
    out = storage.absolute(out)
    arguments = arguments_there(out, request.arguments) if accept_missing else request.arguments
    tally = _Tally()
    source = _open(replace(request, arguments=arguments), tally)
    files = source.files()
    require_no_stranger(out)
    store = Store(out) if is_planned(out) else None
    if store is not None and accept_missing:
        files = with_gone(store, files)
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind, request.limit)
    if store is not None:
        asked = Asked(
            kind=request.kind,
            batch_size=request.batch_size,
            shard_rows=shard_rows,
            shard_rows_derived=request.shard_rows is None,
            source_settings=request.settings(),
            views=request.views,
            pixels=request.pixels,
            decoder=request.decoder,
        )
        require_same_command(store, files, teacher, asked)
        return store
    storage.remove_folder(storage.join(out, ROWS))  # left by a run that was stopped while it planned
    rows, digests = 0, []
    for shard, table in enumerate(_tables(request, source, shard_rows, tally)):
        digests.append(write_plan(out, shard, table))
        rows += table.num_rows
    return create_store(out, _schema(request, files, tally, rows, shard_rows, teacher), digests, files)


def forecast(request: PlanRequest, teacher: TeacherIdentity, keep: int = 0) -> Forecast:
    """Go through the source as planning would, and write nothing. Keeps the first `keep` rows."""
    tally = _Tally()
    source = _open(request, tally)
    files = source.files()
    shard_rows = request.shard_rows or choose_shard_rows(sum(f.size for f in files), request.kind, request.limit)
    rows, first = 0, list[Any]()
    for table in _tables(request, source, _MOST_SHARD, tally):
        first += planned_rows(table.slice(0, keep - len(first)))
        rows += table.num_rows
    schema = _schema(request, files, tally, rows, shard_rows, teacher)
    specs = schema.arrays().values()
    bytes_out = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    return Forecast(schema, bytes_out, first, tally.captions)


def count_rows(request: PlanRequest) -> int:
    """The number of rows that a plan would have; writes nothing."""
    tally = _Tally()
    return sum(table.num_rows for table in _tables(request, _open(request, tally), _MOST_SHARD, tally))


def what_limit_left(schema: EmbeddingStore) -> str | None:
    """A line about what a plan's `limit` kept from being read, if it may have."""
    limit = schema.source.settings.get("limit")
    return f"limit: {counted(limit, 'row')}; what follows in the sources was not read" if limit == schema.rows else None


def _schema(
    request: PlanRequest,
    files: Sequence[SourceFile],
    tally: _Tally,
    rows: int,
    shard_rows: int,
    teacher: TeacherIdentity,
) -> EmbeddingStore:
    if rows == 0:
        what = f"no {request.kind} in {', '.join(names_of(request.arguments))}{found_instead(tally.account.lines())}"
        raise SourceError(what, remedy="check that the files hold what you mean to cache")
    if request.captions and not tally.captions:
        what = f"no image has a caption by --captions {request.captions}{found_instead(tally.account.lines())}"
        raise SourceError(what, remedy="give the place that captions are in: txt, json:FIELD, coco:FILE or a column")
    return EmbeddingStore(
        kind=request.kind,
        rows=rows,
        dim=teacher.embed_dim,
        chunk_rows=chunk_rows(shard_rows),
        shard_rows=shard_rows,
        batch_size=request.batch_size,
        teacher=teacher,
        source=SourceSummary(
            arguments=names_of(request.arguments),
            files=len(files),
            bytes=tally.bytes,
            digest=source_digest(files, request.settings()),
            repeated_keys=tally.repeated_keys(),
            problems=tuple(tally.account.problems),
            skipped=tally.account.skipped(),
            settings=request.settings(),
        ),
        views=request.views,
        pixels=request.pixels,
        decoder=request.decoder,
    )


def choose_shard_rows(source_bytes: int, kind: str, limit: int | None = None) -> int:
    """Rows per shard, a power of two from 512 to 65,536, for about 64 shards or more; by the source's bytes, and the
    most rows that there may be."""
    rows = source_bytes // _BYTES_PER_ROW[kind]
    return shard_size(min(rows, limit or rows) // 64)


def shard_size(rows: int) -> int:
    """The first power of two from 512 to 65,536 that is not below `rows`, or the last."""
    return min(_MOST_SHARD, max(_LEAST_SHARD, 1 << max(0, rows - 1).bit_length()))


def chunk_rows(shard_rows: int) -> int:
    """Rows per chunk; a shard is one chunk or more."""
    return min(_CHUNK, shard_rows)


def require_whole_chunks(shard_rows: int | None) -> None:
    """Raises SourceError for shards that end within a chunk."""
    if shard_rows and shard_rows > _CHUNK and shard_rows % _CHUNK:
        what = f"shards of {shard_rows:,} rows are not whole chunks"
        raise SourceError(what, remedy=f"give --shard-rows a multiple of {_CHUNK:,}, or less than that")


def _open(request: PlanRequest, tally: _Tally) -> Any:
    require_whole_chunks(request.shard_rows)
    if request.kind == "image":
        return open_image_source(list(request.arguments), request.column, tally.account, request.captions)
    return open_text_source(list(request.arguments), request.column, tally.account)


def _samples(request: PlanRequest, source: Any, tally: _Tally) -> Iterator[Any]:
    if request.kind == "text":
        # Prompts are looked up by their words, so both of two that are equal for the tokenizer must be kept.
        prompts = any(isinstance(part, PromptSet) for part in source.parts)
        canonical = None if prompts else request.canonical
        return tidy(source, request.sentences, tally.account, canonical, limit=request.limit)
    samples = islice(source.samples(tally.account), request.limit)
    return _counting_captions(samples, request, tally) if request.captions else samples


def _counting_captions(samples: Iterator[ImageSample], request: PlanRequest, tally: _Tally) -> Iterator[ImageSample]:
    """The samples. Images without a caption, and captions that the teacher does not see whole, are no reason to leave
    anything out, and are counted."""
    for sample in samples:
        tally.captions += len(sample.captions)
        if not sample.captions:
            tally.account.skip("images without a caption (they are cached as the others are)", _place(sample))
        for caption in sample.captions:
            if request.is_cut and request.is_cut(caption):
                reason = "captions whose end is beyond the teacher's context (their beginning is cached)"
                tally.account.skip(reason, f"{_place(sample)}: {caption[:80]}")
        yield sample


def _place(sample: ImageSample) -> str:
    return f"{sample.file}: {sample.key}"


def _tables(request: PlanRequest, source: Any, size: int, tally: _Tally) -> Iterator[pa.Table]:
    """The plan, in tables of `size` rows each."""
    samples, rows = _samples(request, source, tally), 0
    schema = CAPTIONED_PLAN if request.captions else PLANS[request.kind]
    while batch := list(islice(samples, size)):
        columns = dict(zip(batch[0]._fields, zip(*batch, strict=True), strict=True))
        if not request.captions:
            columns.pop(CAPTIONS, None)
        if request.kind == "image":
            tally.keys.extend(map(hash, columns["key"]))
        tally.bytes += sum(
            columns["size"] if request.kind == "image" else (len(text.encode()) for text in columns["text"])
        )
        yield pa.table({"row": np.arange(rows, rows + len(batch)), **columns}, schema=schema)
        rows += len(batch)
