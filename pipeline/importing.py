"""`import-embeddings` as one call: a store of a folder of embeddings that others made.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas import IMAGE_PLAN, TEXT_PLAN, EmbeddingStore, Failure, SourceSummary, Status
from cache_schemas.embedding_store import EMBEDDING, ROWS, STATUS
from dimefm import lock, storage
from dimefm.clip import Clip, load_clip
from dimefm.decode import DecodeError
from dimefm.errors import MismatchError, SourceError
from dimefm.machine import Precision
from dimefm.named import allowing
from dimefm.preprocess import Preprocess
from dimefm.progress import Progress
from dimefm.sources import open_image_source
from dimefm.sources.base import ImageSample, Source, SourceFile
from dimefm.sources.reading import read_encoded
from dimefm.store import Store, create_store
from dimefm.tables import write_plan
from pipeline.clip_retrieval import Folder, Kind
from pipeline.existing import is_planned, require_no_stranger, require_same, source_digest
from pipeline.matching import Images, Names
from pipeline.plan import chunk_rows, require_whole_chunks, shard_size

_BATCH_SIZE = 1  # in the store; the teacher's own is not known
_LEAST_COSINE = 0.99
_BAD_VECTOR = "the imported embedding is NaN, infinite or zero"
_NO_IMAGE = "no image of the sources has this key"
_NO_PIXELS = "imported without --images: serves retrieve, but not train-student, which reads the images"
_NOT_COMPARED = "not compared with the teacher: only the command line says that it made these embeddings"


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One import. `sources` are the images that the embeddings were made from, named as for cache-images; `precision`
    is the teacher's when it made them; `check` rows are encoded again and compared, and with `accept` the embeddings
    are taken whatever comes out."""

    folder: str
    out: str
    kind: Kind
    teacher: str
    pretrained: str | None = None
    precision: Precision = "fp32"
    sources: tuple[str, ...] = ()
    shard_rows: int | None = None
    check: int = 8
    accept: bool = False


def import_embeddings(config: ImportConfig, report: Callable[[str], None] = lambda line: None) -> Store:
    """Make a finished store of a folder of embeddings, in its order of rows; go on where an earlier run stopped.

    Vectors are normalised; one whose norm is within 0.001 of 1 is kept as it is, so that float16 ones stay the same
    to the last bit. NaN, infinite and zero ones keep their row, with NOT_FINITE. With `sources`, rows are matched to
    images by key, and those without one get MISSING: train-student could not read them. Without, an image store has
    no pixels; it serves retrieve, but not train-student. `batch_size` in the store is 1: it is not known. `report` is
    told in a line what was matched and compared.

    Raises SourceError for a folder in another layout, or sources with none of its images; MismatchError for another
    teacher, or a store at `out` of another folder, teacher or setting; OutputExistsError.
    """
    with allowing(config.sources):
        return _import(config, report)


def _import(config: ImportConfig, report: Callable[[str], None]) -> Store:
    folder = Folder(config.folder, config.kind)
    if config.sources and config.kind == "text":
        raise SourceError("images are given for text embeddings", remedy="give --kind image, or no --images")
    source = open_image_source(list(config.sources)) if config.sources else None
    files = folder.files() + (source.files() if source else [])
    require_whole_chunks(config.shard_rows)
    shard_rows = config.shard_rows or shard_size(folder.rows // 64 + 1)  # for about 64 shards or more
    require_no_stranger(config.out)  # before the lock is put into it
    clip = load_clip(config.teacher, config.pretrained, precision=config.precision)
    if folder.dim != clip.identity.embed_dim:
        what = f"{folder.root} holds embeddings {folder.dim} wide; {config.teacher} gives {clip.identity.embed_dim}"
        raise MismatchError(what, remedy="name the teacher that made them")
    with lock.writing(config.out):
        if is_planned(config.out):
            store = Store(config.out)
            require_same(
                store,
                files,
                clip.identity,
                kind=config.kind,
                batch_size=_BATCH_SIZE,
                shard_rows=shard_rows,
                chosen=config.shard_rows is None,
                settings={},
            )
        else:
            store = _plan(config, folder, source, files, shard_rows, clip, report)
        _write(store, folder, unmatched_fail=source is not None)
    return store


# -- planning ---------------------------------------------------------------------------------------------------------


def _plan(
    config: ImportConfig,
    folder: Folder,
    source: Source[ImageSample] | None,
    files: list[SourceFile],
    shard_rows: int,
    clip: Clip,
    report: Callable[[str], None],
) -> Store:
    problems: list[str] = []
    names = Names(key for key, _ in folder.records() if config.kind == "image")
    images = Images(source.samples(problems.append) if source else ())
    image_N = images.match(names) if source else np.full(folder.rows, -1)
    known_N = np.flatnonzero(image_N >= 0) if config.kind == "image" else np.arange(folder.rows)
    if source:
        if not len(known_N):
            examples = f"the first row has the key {names.first!r}, the first image {images.keys.first!r}"
            what = f"no row of {folder.root} is an image of the sources: {examples}"
            raise SourceError(what, remedy="give --images the files that the embeddings were made from")
        report(f"{len(known_N):,} of {folder.rows:,} rows have an image in the sources")
    elif config.kind == "image":
        problems.append(_NO_PIXELS)
    if config.check and len(known_N):
        problems += _check(config, folder, known_N, lambda row: images.place(image_N[row]), clip, report)
    else:
        problems.append(_NOT_COMPARED)

    out = storage.absolute(config.out)
    storage.remove_folder(storage.join(out, ROWS))  # of a run that was stopped while it planned
    records, digests, silent = folder.records(), [], 0
    for shard, start in enumerate(range(0, folder.rows, shard_rows)):
        batch = list(islice(records, shard_rows))
        silent += sum(caption is None for _, caption in batch)
        digests.append(write_plan(out, shard, _table(config.kind, batch, images, image_N, start)))
    if silent and config.kind == "text":
        problems.append(f"{silent:,} rows have no caption; their sentence is empty")
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
            digest=source_digest(files, {}),
            repeated_keys=names.repeated(),
            dropped={},
            problems=tuple(problems),
        ),
    )
    return create_store(out, schema, digests, files)


def _table(
    kind: Kind, batch: list[tuple[str, str | None]], images: Images, image_N: np.ndarray[Any, Any], start: int
) -> pa.Table:
    """The plan of the rows of `batch`, which begin at `start`."""
    rows = range(start, start + len(batch))
    columns: dict[str, Any] = {"row": list(rows), "key": [key for key, _ in batch]}
    if kind == "text":
        return pa.table({**columns, "text": [caption or "" for _, caption in batch]}, schema=TEXT_PLAN)
    places = zip(*(images.place(image_N[row]) for row in rows), strict=True)
    return pa.table({**columns, **dict(zip(("file", "offset", "size"), map(list, places), strict=True))}, IMAGE_PLAN)


def _check(
    config: ImportConfig,
    folder: Folder,
    known_N: np.ndarray[Any, Any],
    place: Callable[[int], tuple[str, int, int]],
    clip: Clip,
    report: Callable[[str], None],
) -> list[str]:
    """Encode a few rows again and compare; what is to be noted in the store. Raises MismatchError below a mean cosine
    of 0.99: the same teacher in another precision gives 0.999, another teacher far less."""
    places = np.linspace(0, len(known_N) - 1, min(config.check, len(known_N))).astype(np.int64)
    cosines = []
    for row, (_, caption) in folder.lookup(known_N[places].tolist()).items():
        embedding_1D, good_1 = folder.read(row, row + 1)
        again_D = _encode(clip, place(row), caption) if good_1[0] else None
        if again_D is not None:
            cosines.append(float(embedding_1D[0].astype(np.float32) @ again_D))
    mean = float(np.mean(cosines)) if cosines else float("nan")
    found = f"mean cosine {mean:.4f} to {config.teacher}, over {len(cosines)} of {len(places)} rows encoded again"
    report(found)
    if mean >= _LEAST_COSINE:
        return []
    if config.accept:
        return [f"accepted at a {found}"]
    what = f"{folder.root}: {found}: these embeddings are not from that teacher, or not of these {config.kind}s"
    raise MismatchError(what, remedy="name the teacher that made them; --accept takes them as they are")


def _encode(clip: Clip, place: tuple[str, int, int], caption: str | None) -> np.ndarray[Any, Any] | None:
    """The teacher's embedding of a caption or of the image at a place, float32 (D,); None where it cannot be had."""
    if caption is not None:
        return clip.encode_texts([caption])[0].cpu().numpy()
    try:
        pixels_3HW = Preprocess(clip.identity.preprocessing)(read_encoded(*place))
    except (OSError, DecodeError):
        return None
    return clip.encode_images(pixels_3HW[None])[0].cpu().numpy()


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(store: Store, folder: Folder, *, unmatched_fail: bool) -> None:
    """Every shard without a commit. With `unmatched_fail`, a row whose plan names no file is left without embedding."""
    schema, committed = store.schema, store.committed()
    if len(committed) == schema.shards:
        return
    storage.remove_leftovers(store.path)
    done = sum(stop - start for start, stop in map(schema.shard_range, committed))
    with Progress("import", schema.rows, "row", done) as progress:
        for shard in sorted(set(range(schema.shards)) - committed):
            began = time.monotonic()
            start, stop = schema.shard_range(shard)
            embedding_ND, good_N = folder.read(start, stop)
            status_N = np.where(good_N, Status.OK, Status.NOT_FINITE).astype(np.uint8)
            plan = store.plan(shard)
            if unmatched_fail:
                status_N[np.array(plan["file"].to_pylist()) == ""] = Status.MISSING
            failed_F = np.flatnonzero(status_N != Status.OK)
            embedding_ND[failed_F] = 0
            failures = [
                _failure(row, status_N[i]) for i, row in zip(failed_F, plan.take(failed_F).to_pylist(), strict=True)
            ]
            seconds = time.monotonic() - began
            store.write_shard(
                shard, {EMBEDDING: embedding_ND, STATUS: status_N}, failures, device="import", seconds=seconds
            )
            done += stop - start
            progress.at(done)


def _failure(row: dict[str, Any], code: int) -> Failure:
    reason = _NO_IMAGE if code == Status.MISSING else _BAD_VECTOR
    return Failure(row=row["row"], key=row["key"], file=row.get("file", ""), status=Status(code).name, reason=reason)
