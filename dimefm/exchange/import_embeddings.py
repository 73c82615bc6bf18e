"""`import-embeddings` as one call: make a store from a folder of embeddings that others made.

Shapes: N rows, F of them failed, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cache_schemas import IMAGE_PLAN, TEXT_PLAN, EmbeddingStore, SourceSummary
from cache_schemas.embedding_store import ROWS, Kind
from cache_schemas.identity import Precision
from cache_schemas.plan import SourceFile
from dimefm.caching.plan import chunk_rows, require_whole_chunks, shard_size
from dimefm.caching.same_command import Asked, require_no_stranger, require_same_command, source_digest
from dimefm.errors import MismatchError, SourceError
from dimefm.exchange.clip_retrieval_folder import Folder
from dimefm.exchange.import_shards import write_shards
from dimefm.exchange.match_names import Matches, match, spread
from dimefm.models.trained import Trained
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, Source
from dimefm.sources.image_sources import open_image_source
from dimefm.store.embedding_store import Store, create_store
from dimefm.store.failures import require_embeddings
from dimefm.store.output_folder import is_planned
from dimefm.store.parquet_tables import write_plan
from dimefm.system import lock, storage
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.shard_work import ShardRunner, run_here

if TYPE_CHECKING:
    from dimefm.models.clip import Clip

_BATCH_SIZE = 1  # recorded in the store; that of the teacher is not known
_SHOWN = 3
_NO_PIXELS = "imported without --images: serves retrieve, but not train-student, which reads the images"
_NOT_COMPARED = "not compared with the teacher: only the command line says that it made these embeddings"


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One import. A row's image is the one with the same key or path; else the one whose path has the most last parts
    in common with the row's, `match_parts` or more."""

    folder: str
    """Folder to import: img_emb/ or text_emb/, beside metadata/."""
    out: str
    """Store to write: a folder or URL, such as IMAGES.zarr."""
    kind: Kind
    """What to import: image reads img_emb/, text reads text_emb/."""
    teacher: str
    """Teacher that made the embeddings, an open_clip model: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER."""
    pretrained: str | None = None
    """Weights of a plain NAME: an open_clip tag or a file."""
    trained: Trained | None = None
    """What weights in a file do not say of themselves: their preprocessing and activation."""
    precision: Precision = "fp32"
    """Number format of the teacher's matrix products when it made the embeddings."""
    sources: tuple[str, ...] = ()
    """Images that the embeddings were made from, as for cache-images."""
    limit: int | None = None
    """Import only the first this many rows."""
    shard_rows: int | None = None
    """Rows per shard. Default: about 64 shards or more, by the number of rows."""
    check: int = 8
    """Number of rows that are encoded again and compared."""
    accept: bool = False
    """Import embeddings even if the teacher gives others."""
    match_parts: int = 1
    """How many last parts a row's path must share with an image's path, unless key or path are the same."""


def import_embeddings(
    config: ImportConfig, report: Callable[[str], None] = lambda line: None, run: ShardRunner = run_here
) -> Store:
    """Make a finished store from a folder of embeddings, in its order of rows; go on where an earlier run stopped.

    Vectors are normalised, except those whose norm is within 0.001 of 1, so that float16 ones stay the same to the last
    bit. NaN, infinite and zero vectors keep their row, with NOT_FINITE. With `sources`, rows are matched to images (see
    exchange.match_names), and those without one get MISSING: train-student could not read them. Without `sources`, an
    image store has no pixels; it serves retrieve, but not train-student. `batch_size` in the store is 1, as it is not
    known. `report` is called with lines about what was matched and compared; rows with the weakest match are compared
    first. `run` has the shards written, once all is planned.

    Raises SourceError for a folder in another layout, or sources with none of its images; MismatchError for another
    teacher, or a store at `out` of another folder, teacher or setting; StoreError where no row has an embedding;
    OutputExistsError.
    """
    with allowing(config.sources):
        return _import(config, report, run)


def _import(config: ImportConfig, report: Callable[[str], None], run: ShardRunner) -> Store:
    require_name(config.out, "a store", ".zarr")
    account = Account()
    folder = Folder(config.folder, config.kind, account, config.limit)
    if config.sources and config.kind == "text":
        raise SourceError("images are given for text embeddings", remedy="give --kind image, or no --images")
    if config.match_parts > 1 and not config.sources:
        raise SourceError("--match-parts has no effect without --images", remedy="leave it out, or give the images")
    source = open_image_source(list(config.sources), account=account) if config.sources else None
    files = folder.files() + (source.files() if source else [])
    require_whole_chunks(config.shard_rows)
    shard_rows = config.shard_rows or shard_size(folder.rows // 64 + 1)  # for about 64 shards or more
    require_no_stranger(config.out)  # before the lock is put into it
    begun = Store(config.out).schema.teacher if is_planned(config.out) else None
    note(f"{folder.rows:,} embeddings: loading the teacher ...")
    from dimefm.models.clip import load_clip  # imports torch and open_clip

    clip = load_clip(config.teacher, config.pretrained, trained=config.trained, known=begun, precision=config.precision)
    if folder.dim != clip.identity.embed_dim:
        what = f"{folder.root} holds embeddings {folder.dim} wide; {config.teacher} gives {clip.identity.embed_dim}"
        raise MismatchError(what, remedy="name the teacher that made them")
    with lock.writing(config.out, of_use=lambda files: is_planned(config.out)):
        if is_planned(config.out):
            store = Store(config.out)
            asked = Asked(
                kind=config.kind,
                batch_size=_BATCH_SIZE,
                shard_rows=shard_rows,
                shard_rows_derived=config.shard_rows is None,
                source_settings=_settings(config),
            )
            require_same_command(store, files, clip.identity, asked)
        else:
            store = _plan(config, folder, source, files, shard_rows, clip, account, report)
        write_shards(store, folder, run, unmatched_fail=source is not None)
        require_embeddings(store)
    return store


def _plan(
    config: ImportConfig,
    folder: Folder,
    source: Source[ImageSample] | None,
    files: list[SourceFile],
    shard_rows: int,
    clip: Clip,
    account: Account,
    report: Callable[[str], None],
) -> Store:
    matches, checked_N = None, spread(np.arange(folder.rows), config.check)
    if config.kind == "image":
        samples = source.samples(account) if source else ()
        matches = match((key for key, _ in folder.records()), samples, least=config.match_parts)
        checked_N = matches.sample(config.check)
        account.problems += _report_matches(matches, folder, report) if source else [_NO_PIXELS]
        if count := len(spare_N := matches.spare()):
            reason = "images of the sources without an embedding" + (" before --limit" if config.limit else "")
            account.skip(reason, matches.images.place(int(spare_N[0]))[0], count)
            report(f"{reason}: {count:,}")
    notes = [_NOT_COMPARED]
    if len(checked_N):
        from dimefm.exchange.compare_with_teacher import compare_with_teacher

        teacher, accept = config.teacher, config.accept
        notes = compare_with_teacher(folder, checked_N, matches, clip, teacher=teacher, accept=accept, report=report)
    account.problems += notes

    out = storage.absolute(config.out)
    storage.remove_folder(storage.join(out, ROWS))  # of a run that was stopped while it planned
    records, digests, silent = folder.records(), [], 0
    for shard, start in enumerate(range(0, folder.rows, shard_rows)):
        batch = list(islice(records, shard_rows))
        silent += sum(caption is None for _, caption in batch)
        digests.append(write_plan(out, shard, _table(batch, matches, start)))
    if silent and config.kind == "text":
        account.problem(f"rows without a caption, whose sentence is empty: {silent:,}")
    schema = EmbeddingStore(
        kind=config.kind,
        rows=folder.rows,
        dim=folder.dim,
        chunk_rows=chunk_rows(shard_rows),
        shard_rows=shard_rows,
        batch_size=_BATCH_SIZE,
        teacher=clip.identity,
        source=SourceSummary(
            arguments=(config.folder, *config.sources),
            files=len(files),
            bytes=sum(file.size for file in files),
            digest=source_digest(files, _settings(config)),
            repeated_keys=matches.repeated if matches else 0,
            problems=tuple(account.problems),
            skipped=account.skipped(),
            settings=_settings(config),
        ),
    )
    return create_store(out, schema, digests, files)


def _settings(config: ImportConfig) -> dict[str, object]:
    """The settings that, with the files, decide the rows and which image each has."""
    parts: dict[str, object] = {"match_parts": config.match_parts} if config.match_parts > 1 else {}
    return {**parts, "limit": config.limit} if config.limit else parts


def _report_matches(matches: Matches, folder: Folder, report: Callable[[str], None]) -> list[str]:
    """Report how many rows have an image, by kind of match; returns the notes for the store. Raises SourceError where
    no row has one."""
    kinds, ambiguous = matches.kinds(), matches.ambiguous()
    if not kinds:
        examples = "the first row has the key {!r}, the first image {!r}".format(*matches.first)
        what = f"no row of {folder.root} is an image of the sources: {examples}"
        remedy = "give --images the files that the embeddings were made from"
        if len(ambiguous):
            what = f"{len(ambiguous):,} rows of {folder.root} match several images each: {examples}"
        if len(ambiguous) and matches.repeated:
            what = f"{matches.repeated:,} rows of {folder.root} have the key of a row before them: {examples}"
            remedy = "take away the files that are there twice, or make the metadata again with keys that differ"
        raise SourceError(what, remedy=remedy)
    by = ", ".join(f"{count:,} by {name}" for _, name, count in kinds)
    known = sum(count for _, _, count in kinds)
    report(f"{known:,} of {len(matches.image_N):,} rows have an image in the sources: {by}")
    notes = [f"rows whose image shares {name} with their key: {count:,}" for n, name, count in kinds if n == 1]
    if len(ambiguous):
        found = folder.lookup(ambiguous[:_SHOWN].tolist())
        keys = ", ".join(repr(key) for key, _ in found.values())
        notes.append(
            f"rows without an image, as several match as well as each other: {len(ambiguous):,}, such as {keys}"
        )
        report(notes[-1])
    return notes


def _table(batch: list[tuple[str, str | None]], matches: Matches | None, start: int) -> pa.Table:
    """The plan of the rows of `batch`, from row `start` on: an image plan with `matches`, else a text plan."""
    rows = range(start, start + len(batch))
    columns: dict[str, Any] = {"row": list(rows), "key": [key for key, _ in batch]}
    if matches is None:
        return pa.table({**columns, "text": [caption or "" for _, caption in batch]}, schema=TEXT_PLAN)
    places = zip(*(matches.place(row) for row in rows), strict=True)
    return pa.table({**columns, **dict(zip(("file", "offset", "size"), map(list, places), strict=True))}, IMAGE_PLAN)
