"""What a selection of images leaves for its readers: the kept rows, what each copy repeats, a report in Markdown.

Shapes: T images of the store, K kept images of a shard, R rows that repeat another.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.image_selection import (
    COPIES,
    DROPPED_FILE,
    SELECTED_IMAGES,
    ImageSelection,
    ImageSelectionSettings,
)
from cache_schemas.text_selection import ROWS_FILE, Histogram, SourceShare
from dimefm.selection.narrow import Outcome
from dimefm.selection.report import histogram_bars, source_table
from dimefm.sources.image_kinds import CONTAINERS
from dimefm.sources.parquet import split_column
from dimefm.store.embedding_store import Store
from dimefm.store.parquet_tables import write_table
from dimefm.system import storage
from dimefm.system.progress import Progress

_BINS, _MOST = 20, 10
_Array = np.ndarray[Any, Any]

REASONS = {
    Outcome.NO_EMBEDDING: "without an embedding",
    Outcome.LEAKED: "in a test set",
    Outcome.COPY: "the same bytes as another, by --exact",
    Outcome.UNWANTED: "near to a sentence, by --drop-near",
    Outcome.POOL: "beyond --top",
    Outcome.REPEATED: "repeated, by --dedup",
    Outcome.CAP: "above the cap of their cluster, by --balance",
    Outcome.SIZE: "beyond --size",
}
"""As selection.json has them."""


def source_of(file: str) -> str:
    """What an image is counted under: the tar or table that it lies in, or the folder of a file of its own."""
    path, _ = split_column(file)
    return path if path.lower().endswith(CONTAINERS) else path.rpartition("/")[0]


def write_kept_images(
    out: str, images: Store, outcome_T: _Array, score_T: _Array
) -> tuple[tuple[SourceShare, ...], str]:
    """Write rows.parquet, a shard of the store at a time. Returns the share kept of each source and the sha256 of the
    file. Raises StoreError where it cannot be written."""
    total, kept = Counter[str](), Counter[str]()
    path = storage.join(out, ROWS_FILE)
    with (
        storage.writing_to(out),
        storage.writing_atomically(path) as file,
        pq.ParquetWriter(file, SELECTED_IMAGES, compression="zstd") as writer,
        Progress("writing", images.schema.rows, "image") as progress,
    ):
        for shard in range(images.schema.shards):
            start, stop = images.schema.shard_range(shard)
            plan, kept_K = images.plan(shard), np.flatnonzero(outcome_T[start:stop] == Outcome.KEPT)
            sources = list(map(source_of, plan["file"].to_pylist()))
            score_K = score_T[start + kept_K]
            columns = {
                "row": pa.array(start + kept_K, pa.int64()),
                "score": pa.array(score_K, pa.float32(), mask=np.isnan(score_K)),
                "key": plan["key"].take(pa.array(kept_K)),
                "file": plan["file"].take(pa.array(kept_K)),
            }
            writer.write_table(pa.table(columns, schema=SELECTED_IMAGES))
            total.update(sources)
            kept.update(sources[place] for place in kept_K.tolist())
            progress.at(stop)
    shares = tuple(SourceShare(file=name, rows=total[name], kept=kept[name]) for name in sorted(total))
    return shares, storage.digest_file(path)


def write_copies(
    out: str, outcome_T: _Array, copies: tuple[_Array, _Array], repeated: tuple[_Array, _Array]
) -> tuple[dict[str, int], str]:
    """Write dropped.parquet: each image that repeats a kept one, and which. Returns how many kept images stand for how
    many, and the sha256 of the file."""
    like_T = np.full(len(outcome_T), -1, np.int64)
    like_T[repeated[0]] = repeated[1]
    rows_R = np.concatenate([copies[0], repeated[0]]).astype(np.int64)
    like_R = np.concatenate([copies[1], repeated[1]]).astype(np.int64)
    like_R = np.where(like_T[like_R] >= 0, like_T[like_R], like_R)  # a copy of what repeats another
    same_R = np.arange(len(rows_R)) < len(copies[0])
    stays_R = outcome_T[like_R] == Outcome.KEPT  # its better one may have been left out by a later condition
    order = np.argsort(rows_R[stays_R], kind="stable")
    columns = [rows_R[stays_R][order], like_R[stays_R][order], same_R[stays_R][order]]
    digest = write_table(storage.join(out, DROPPED_FILE), pa.table(columns, schema=COPIES))
    sizes_T = (outcome_T == Outcome.KEPT) + np.bincount(like_R[stays_R], minlength=len(outcome_T))
    found = Counter(np.minimum(sizes_T[outcome_T == Outcome.KEPT], _MOST + 1).tolist())
    names = {size: str(size) if size <= _MOST else f"{_MOST + 1} or more" for size in found}
    return {names[size]: found[size] for size in sorted(found)}, digest


def score_histogram(settings: ImageSelectionSettings | None, outcome_T: _Array, score_T: _Array) -> Histogram | None:
    """Kept and dropped images by the score that ranks them; None where there is none."""
    usable_T = ~np.isnan(score_T)
    if settings is None or settings.by == "random" or not usable_T.any():
        return None
    value_N, kept_N = score_T[usable_T], outcome_T[usable_T] == Outcome.KEPT
    edges = np.linspace(float(value_N.min()), max(float(value_N.max()), float(value_N.min()) + 1e-6), _BINS + 1)
    kept, dropped = (np.histogram(value_N[mask_N], edges)[0].tolist() for mask_N in (kept_N, ~kept_N))
    of = "score" if settings.by == "near" else "cosine to the middle of its cluster"
    return Histogram(of=of, edges=tuple(round(e, 6) for e in edges.tolist()), kept=tuple(kept), dropped=tuple(dropped))


def describe_image_settings(selection: ImageSelection) -> str:
    """The settings that were asked for, in one line."""
    settings = selection.plan.settings
    if settings is None:
        return "all but those that dimefm leaks found in test sets"
    words = [f"by {settings.by}"]
    words += ["one of each file"] if settings.exact else []
    words += [f"none with a cosine of {settings.drop_above:g} to {query!r}" for query in settings.drop_near]
    words += [f"top {settings.top:,}"] if settings.top is not None else []
    words += [f"none with a cosine of {settings.dedup:g} to a better one"] if settings.dedup is not None else []
    if selection.cap is not None:
        words.append(f"at most {selection.cap:,} of each of {selection.clusters:,} clusters")
    words += [f"size {settings.size:,}"] if settings.size is not None else []
    return ", ".join([*words, f"seed {settings.seed}"])


def markdown_report(selection: ImageSelection) -> str:
    """The content of report.md."""
    parts = [f"# {selection.kept:,} of {selection.rows:,} images", "", describe_image_settings(selection), ""]
    parts += ["## By source", "", *source_table(selection, "images"), "", "## What was left out", ""]
    parts += [f"- {count:,}: {reason}" for reason, count in selection.dropped.items()] or ["- nothing"]
    if selection.groups.keys() - {"1"}:
        parts += ["", "## How many images a kept one stands for", ""]
        parts += [f"- {size}: {count:,}" for size, count in selection.groups.items()]
    if selection.histogram:
        parts += ["", f"## By {selection.histogram.of}", "", "```", *histogram_bars(selection.histogram), "```"]
    parts += ["", "`dimefm report` shows the pictures."]
    return "\n".join(parts) + "\n"
