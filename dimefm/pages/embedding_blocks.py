"""Blocks about the embeddings of a store, by a sample of them: norms, cosines, a map, and what is alike.

Shapes: N rows of the sample, M of them on the map, V views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dimefm.pages.charts import histogram, point_map
from dimefm.pages.likeness import Nearest, nearest, random_cosines
from dimefm.pages.page import Block, Cell, Chart, Dot, Table, Words
from dimefm.pages.pictures import Pictures
from dimefm.pages.row_sample import RowSample, principal_components, sample_rows
from dimefm.pages.short_words import short, short_names
from dimefm.selection.report import source_file
from dimefm.sources.parquet import split_column
from dimefm.store.embedding_store import Store

_SAMPLE, _NORMS, _RANDOM_PAIRS, _PAIRS = 5000, 1000, 10_000, 24
_BINS, _COLOURS = 40, 7
_ALIKE = (0.99, 0.95, 0.9)
_MAP_SIDE = 96  # pixels: a page holds hundreds of them


class Looked(NamedTuple):
    """A store, and what was looked at in it: a sample of `good` rows that have an embedding, what is nearest to each of
    the sample, and its pictures if it has images."""

    store: Store
    good: int
    sample: RowSample
    nearest: Nearest
    pictures: Pictures | None


def look(store: Store, good: int) -> Looked | None:
    """Read a sample of a store of which `good` rows have an embedding; None where there are fewer than two."""
    sample = sample_rows(store, _SAMPLE)
    if len(sample.rows_N) < 2:
        return None
    pictures = Pictures(store, _MAP_SIDE) if store.schema.kind == "image" else None
    return Looked(store, good, sample, nearest(sample.embedding_ND), pictures)


def in_words(looked: Looked) -> str:
    """How many rows are in the sample."""
    rows = len(looked.sample.rows_N)
    if rows == looked.good:
        return f"all {rows:,} rows with an embedding"
    return f"{rows:,} of {looked.good:,} rows with an embedding, drawn at random from parts spread over the store"


def distributions(looked: Looked) -> list[Block]:
    """Histograms of norms and of cosines."""
    rows_N, embedding_ND = looked.sample
    normed_M = rows_N if len(rows_N) <= _NORMS else np.random.default_rng(0).choice(rows_N, _NORMS, replace=False)
    stored = looked.store.embeddings(normed_M).astype(np.float32)
    norms = np.linalg.norm(stored, axis=-1).ravel()
    what = f"{norms.size:,} embeddings of {len(normed_M):,} rows" if stored.ndim == 3 else f"{norms.size:,} rows"
    rows = f"{len(rows_N):,} rows"
    return [
        _histogram("Norms, as stored", norms, "norm", 0.002, f"of {what}"),
        _histogram(
            "Cosines of random pairs", random_cosines(embedding_ND, _RANDOM_PAIRS), "cosine", 0.02,
            f"{_RANDOM_PAIRS:,} pairs of {rows}", along="pairs",
        ),
        _histogram(
            "Cosine to the nearest other row", looked.nearest.cosine_N, "cosine", 0.02,
            f"of {rows}, each among these rows: with all rows of a larger store it would be higher",
        ),
    ]  # fmt: skip


def _histogram(
    title: str, values: np.ndarray[Any, Any], across: str, least: float, note: str, along: str = "rows"
) -> Chart:
    """A histogram of at least a width `least`, so that rounding does not look like a spread."""
    low, high = float(values.min()), float(values.max())
    more = max(0.0, least - (high - low)) / 2
    counts, edges = np.histogram(values, _BINS, (low - more, high + more))
    return histogram(title, edges.tolist(), [(along, counts.tolist())], across, along, note=note)


def embedding_map(looked: Looked, most: int) -> Chart:
    """At most `most` rows of the sample by the two directions in which they differ most, coloured by source."""
    rows_N, embedding_ND = looked.sample
    chosen_M = np.sort(np.random.default_rng(0).permutation(len(rows_N))[:most])
    named = _named(looked.store, rows_N[chosen_M])
    groups, labels = _groups([source for source, _ in named], files=looked.store.schema.kind == "image")
    images = looked.pictures.of(rows_N[chosen_M]) if looked.pictures else [None] * len(chosen_M)
    places = principal_components(embedding_ND[chosen_M]).tolist()
    dots = [
        Dot(x, y, words, group, image)
        for (x, y), (_, words), group, image in zip(places, named, groups, images, strict=True)
    ]
    what = f"{len(dots):,} of {looked.good:,} rows with an embedding"
    note = f"{what}, by the two directions in which they differ most (PCA). Point at one to see what it is."
    return point_map("Map of the embeddings, coloured by source", dots, labels, note=note)


def _named(store: Store, rows_N: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """For each row the source that it is from, and its words."""
    if store.schema.kind == "text":
        samples = store.samples(rows_N, ("key", "text"))
        return [(source_file(one["key"]), f"{short(one['text'])} (row {one['row']:,})") for one in samples]
    samples = store.samples(rows_N, ("key", "file"))
    return [(one["file"], f"{short(one['key'])} (row {one['row']:,})") for one in samples]


def _groups(sources: Sequence[str], *, files: bool) -> tuple[list[int], list[str]]:
    """For each row the number of its colour, and the names of the colours: the most frequent sources, and the rest.
    Where most rows have a file of their own, the folders are the sources."""
    if files and len(set(sources)) > len(sources) / 2:
        sources = [split_column(one)[0].rpartition("/")[0] for one in sources]
    common = [name for name, _ in Counter(sources).most_common(_COLOURS)]
    number = {name: place for place, name in enumerate(common)}
    labels = [name or "no file" for name in short_names(common)]
    labels += [""] * (_COLOURS - len(labels)) + ["other"]
    return [number.get(source, _COLOURS) for source in sources], labels


def duplicates(looked: Looked) -> list[Block]:
    """How many rows of the sample have another that is very like them, and the most alike pairs."""
    rows_N, cosine_N = looked.sample.rows_N, looked.nearest.cosine_N
    counts = []
    for bound in _ALIKE:
        share = float((cosine_N > bound).mean())
        counts.append((f"above {bound:g}", Cell(f"{(cosine_N > bound).sum():,}"), Cell(f"{share:.2%}", share=share)))
    pairs = looked.nearest.pairs(_PAIRS)
    both_M = rows_N[[place for one, other, _ in pairs for place in (one, other)]]
    named = _named(looked.store, both_M)
    images = looked.pictures.of(both_M) if looked.pictures else [None] * len(both_M)
    cells = [Cell(words, image=image) for (_, words), image in zip(named, images, strict=True)]
    rows = [
        (one, other, Cell(f"{cosine:.4f}", cosine))
        for one, other, (_, _, cosine) in zip(cells[::2], cells[1::2], pairs, strict=True)
    ]
    return [
        Words(
            f"This is of a sample: {in_words(looked)}. "
            + (
                ""
                if len(rows_N) == looked.good
                else "Copies that were not drawn are not seen: the store may have more."
            )
        ),
        Table(
            ("cosine to the nearest", "rows", "share"), counts, "lrr", "Rows of the sample by their nearest other row"
        ),
        Table(("one", "other", "cosine"), rows, "llr", "The most alike pairs of the sample"),
    ]
