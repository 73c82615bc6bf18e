"""What a selection leaves for its readers: the kept sentences, counts by source file, examples, a report in Markdown.

Shapes: T sentences of the store, N of them with an embedding, K kept sentences of a shard.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.image_selection import ImageSelection
from cache_schemas.text_selection import (
    ROWS_FILE,
    SELECTED_ROWS,
    SENTENCES_FILE,
    Example,
    Histogram,
    SelectionSettings,
    SourceShare,
    TextSelection,
)
from dimefm.selection.choose_texts import ChosenTexts, in_words, ranking
from dimefm.selection.narrow import Outcome
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.inert_text import markdown
from dimefm.system.markdown_table import markdown_table
from dimefm.system.progress import Progress
from dimefm.system.wording import counted

_BINS, _EXAMPLES, _SOURCES, _BAR, _CUT = 20, 8, 50, 40, 160


def source_file(key: str) -> str:
    """The file, or the labelled set, that a sentence is from by its key; empty where the key names none."""
    file, colon, _ = key.rpartition(":")
    return file if colon else key.partition("/")[0] if "/" in key else ""


def write_kept(
    out: str, texts: Store, outcome_T: np.ndarray[Any, Any], hits_T: np.ndarray[Any, Any], score_T: np.ndarray[Any, Any]
) -> tuple[tuple[SourceShare, ...], str]:
    """Write rows.parquet and sentences.txt, a shard of the store at a time. Returns the share kept of each source file
    and the sha256 of rows.parquet. Raises StoreError where they cannot be written."""
    total: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    path = storage.join(out, ROWS_FILE)
    with (
        storage.writing_to(out),
        storage.writing_atomically(path) as file,
        pq.ParquetWriter(file, SELECTED_ROWS, compression="zstd") as writer,
        Progress("writing", texts.schema.rows, "text") as progress,
    ):
        for shard in range(texts.schema.shards):
            start, stop = texts.schema.shard_range(shard)
            plan, kept_K = texts.plan(shard), np.flatnonzero(outcome_T[start:stop] == Outcome.KEPT)
            files = [source_file(key) for key in plan["key"].to_pylist()]
            kept_files = [files[i] for i in kept_K.tolist()]
            score_K = score_T[start + kept_K]
            columns = {
                "row": pa.array(start + kept_K, pa.int64()),
                "score": pa.array(score_K, pa.float32(), mask=np.isnan(score_K)),
                "hits": pa.array(hits_T[start + kept_K], pa.uint32()),
                "file": pa.array(kept_files, pa.string()),
                "text": plan["text"].take(pa.array(kept_K)),
            }
            writer.write_table(pa.table(columns, schema=SELECTED_ROWS))
            total.update(files)
            kept.update(kept_files)
            progress.at(stop)
    # One file after the other: an object store's file system finishes only the second of two files open at once.
    with storage.writing_to(out), storage.writing_atomically(storage.join(out, SENTENCES_FILE)) as file:
        for shard in range(texts.schema.shards):
            kept_K = np.flatnonzero(outcome_T[slice(*texts.schema.shard_range(shard))] == Outcome.KEPT)
            sentences = texts.plan(shard)["text"].take(pa.array(kept_K)).to_pylist()
            file.write("".join(f"{' '.join(text.split())}\n" for text in sentences).encode())
    sources = tuple(SourceShare(file=name, rows=total[name], kept=kept[name]) for name in sorted(total))
    return sources, storage.digest_file(path)


def histogram(
    settings: SelectionSettings,
    outcome_T: np.ndarray[Any, Any],
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
) -> Histogram | None:
    """Kept and dropped sentences by the value that ranks them; None for a random draw."""
    if settings.by == "random":
        return None
    usable_T = outcome_T != Outcome.NO_EMBEDDING
    kept_N = outcome_T[usable_T] == Outcome.KEPT
    if settings.by == "similarity":
        of, value_N = "score", score_T[usable_T]
        edges = np.linspace(float(value_N.min()), float(value_N.max()), _BINS + 1)
    else:
        of, value_N = "images with it among their top k", hits_T[usable_T]
        edges = np.array([0, 1, *(1 + 2.0 ** np.arange(int(value_N.max()).bit_length() + 1))])
    kept, dropped = (np.histogram(value_N[mask_N], edges)[0].tolist() for mask_N in (kept_N, ~kept_N))
    return Histogram(of=of, edges=tuple(round(e, 6) for e in edges.tolist()), kept=tuple(kept), dropped=tuple(dropped))


def examples(
    settings: SelectionSettings,
    texts: Store,
    chosen: ChosenTexts,
    hits_T: np.ndarray[Any, Any],
    score_T: np.ndarray[Any, Any],
) -> tuple[Example, ...]:
    """A few sentences of each group: the best and the last that were kept, the best that were not, some at random."""
    outcome_T, rng = chosen.outcome_T, np.random.default_rng((settings.seed, 5))
    kept = np.flatnonzero(outcome_T == Outcome.KEPT)
    ranked_out = (Outcome.FEW_HITS, Outcome.LOW_SCORE, Outcome.POOL, Outcome.SIZE)
    groups: dict[str, np.ndarray[Any, Any]] = {}
    if settings.by != "random":
        order = ranking(settings, kept, hits_T, score_T)
        groups["kept, the best"], groups["kept, the last"] = order[:_EXAMPLES], order[-_EXAMPLES:]
        out = ranking(settings, np.flatnonzero(np.isin(outcome_T, ranked_out)), hits_T, score_T)
        groups["dropped, the best"] = out[:_EXAMPLES]
    groups["kept, at random"] = _draw(kept, rng)
    groups["dropped, at random"] = _draw(np.flatnonzero(np.isin(outcome_T, ranked_out)), rng)
    groups["dropped, of a cluster at its cap"] = _draw(np.flatnonzero(outcome_T == Outcome.CAP), rng)
    places = _draw(np.arange(len(chosen.repeated[0])), rng)
    groups["dropped, repeated"] = chosen.repeated[0][places]
    like = dict(zip(*(rows[places].tolist() for rows in chosen.repeated), strict=True))
    like_texts = {sample["row"]: sample["text"] for sample in texts.samples(np.array(list(like.values()), np.int64))}
    return tuple(
        Example(
            group=group,
            row=sample["row"],
            score=None if np.isnan(score_T[sample["row"]]) else round(float(score_T[sample["row"]]), 4),
            hits=int(hits_T[sample["row"]]),
            file=source_file(sample["key"]),
            text=sample["text"],
            like=like_texts[like[sample["row"]]] if group == "dropped, repeated" else None,
        )
        for group, rows in groups.items()
        for sample in texts.samples(rows)
    )


def _draw(rows: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return np.sort(rng.choice(rows, min(_EXAMPLES, len(rows)), replace=False)) if len(rows) else rows


def markdown_report(selection: TextSelection) -> str:
    """The content of report.md."""
    parts = [
        f"# {selection.kept:,} of {selection.rows:,} sentences",
        "",
        describe_settings(selection),
        "",
        "## By source file",
        "",
    ]
    parts += source_table(selection, "sentences")
    parts += ["", "## What was left out", "", *(f"- {n:,}: {why}" for why, n in left_out(selection))]
    if not selection.dropped:
        parts.append("- nothing")
    if selection.histogram:
        parts += ["", f"## By {selection.histogram.of}", "", "```", *histogram_bars(selection.histogram), "```"]
    for group in dict.fromkeys(example.group for example in selection.examples):
        parts += ["", f"## Examples: {group}", ""]
        parts += [_example(example) for example in selection.examples if example.group == group]
    return "\n".join(parts) + "\n"


def left_out(selection: TextSelection) -> list[tuple[str, int]]:
    """Why sentences were left out, in words, and how many, in the order in which the conditions apply."""
    settings, cap = selection.plan.settings, selection.cap
    return [(in_words(reason, settings, cap), count) for reason, count in selection.dropped.items()]


def describe_settings(selection: TextSelection) -> str:
    """The settings that were asked for, in one line."""
    settings = selection.plan.settings
    words = [f"by {settings.by}"]
    words += [f"{name.replace('_', ' ')} {getattr(settings, name):g}" for name in ("min_hits", "min_score", "pool")
              if getattr(settings, name) is not None]  # fmt: skip
    if settings.among is not None:
        words.insert(1, "among the rows given")
    if settings.dedup is not None:
        words.append(f"none with a cosine of {settings.dedup:g} to a better one")
    if selection.cap is not None:
        words.append(f"at most {selection.cap:,} of each of {selection.clusters:,} clusters")
    if settings.size is not None:
        words.append(f"size {settings.size:,}")
    if settings.images_sample is not None:
        words.append(f"scored against {settings.images_sample:,} images")
    if settings.by != "hits" or selection.clusters is not None:
        words.append(f"seed {settings.seed}")
    return ", ".join(words)


def source_table(selection: TextSelection | ImageSelection, what: str) -> list[str]:
    """Rows of a table of the source files, those that gave the most first."""
    found = sorted(selection.sources, key=lambda source: (-source.kept, -source.rows, source.file))
    rows = [("file", what, "kept", "share of the file", "share of the selection")]
    for s in found[:_SOURCES]:
        shares = (f"{s.kept / s.rows:.1%}", f"{s.kept / selection.kept:.1%}")
        rows.append((markdown(s.file) or "(none)", f"{s.rows:,}", f"{s.kept:,}", *shares))
    if len(found) > _SOURCES:
        rows.append((f"and {len(found) - _SOURCES:,} more", "", "", "", ""))
    return markdown_table(rows, align="lrrrr")


def histogram_bars(found: Histogram) -> list[str]:
    """A histogram of characters, one line per bin."""
    most = max(a + b for a, b in zip(found.kept, found.dropped, strict=True))
    lines = [f"{'from':>10}  {'kept':>10}  {'dropped':>10}  # kept  . dropped"]
    for low, kept, dropped in zip(found.edges[:-1], found.kept, found.dropped, strict=True):
        whole = round(_BAR * (kept + dropped) / most)
        full = round(whole * kept / max(1, kept + dropped))
        lines.append(f"{low:>10.4g}  {kept:>10,}  {dropped:>10,}  {'#' * full}{'.' * (whole - full)}".rstrip())
    return lines


def _example(example: Example) -> str:
    score = "no score" if example.score is None else f"{example.score:.3f}"
    like = f" (like: {_short(example.like)})" if example.like is not None else ""
    return f"- {score}, {counted(example.hits, 'hit')}, {markdown(example.file)}: {_short(example.text)}{like}"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return markdown(flat if len(flat) <= _CUT else f"{flat[: _CUT - 3]}...")
