"""Sections about pairs: the nearest sentences of images, or their captions, finished or not.

Scores, keys, pictures and sentences are those of a sample of the images; hits are those of all sentences.

Shapes: N images of the sample, K sentences of an image, T sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cache_schemas import SchemaError
from dimefm.errors import DimefmError
from dimefm.inspection.describe_retrieval import named_store
from dimefm.inspection.info import examine
from dimefm.pages.charts import Line, histogram, line_chart
from dimefm.pages.page import Block, Card, Cell, Facts, Gallery, Section, Table, Words
from dimefm.pages.pictures import Pictures
from dimefm.pages.short_words import short, short_names
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system.wording import counted

_SAMPLE, _SHARDS = 4000, 16
_CARDS, _SENTENCES, _MOST_HIT = 12, 3, 30
_BINS, _BLOCK, _LETTERS = 40, 1 << 20, 110


class _Sample(NamedTuple):
    """Images that have a sentence: their rows, int64 (N,), and the rows and scores of their sentences (N, K)."""

    row_N: np.ndarray[Any, Any]
    text_NK: np.ndarray[Any, Any]
    score_NK: np.ndarray[Any, Any]


def pairs_sections(paths: Sequence[str]) -> list[Section]:
    """What is in each of the pairs."""
    return [section for path, name in zip(paths, short_names(paths), strict=True) for section in _pairs(path, name)]


def _pairs(path: str, name: str) -> list[Section]:
    pairs, found = Pairs(path), examine(path)
    images, texts = _Named(pairs, "image"), _Named(pairs, "text")
    sample, finished = _sample(pairs), found.facts["finished"]
    blocks: list[Block] = [*images.warnings, *texts.warnings, Facts([("path", pairs.path), *found.rows])]
    if not finished:
        blocks.insert(0, Words("These pairs are unfinished: hits are counted at the end.", warning=True))
    if len(sample.row_N):
        blocks += _scores(pairs, sample)
    hits_T = pairs.hits() if finished else None
    if hits_T is not None and hits_T.any():
        blocks.append(_hits(hits_T))
    sections = [Section(f"{name}: {'captions' if pairs.schema.kind == 'captions' else 'pairs'}", blocks)]
    if len(sample.row_N):
        sections.append(Section(f"{name}: images", _galleries(sample, images, texts)))
    if hits_T is not None and hits_T.any():
        sections.append(Section(f"{name}: sentences", [_most_hit(hits_T, texts)]))
    return sections


class _Named:
    """A store that pairs name; `warnings` says why it cannot be opened, if so."""

    def __init__(self, pairs: Pairs, kind: Literal["image", "text"]) -> None:
        self.store: Store | None = None
        self.warnings: list[Words] = []
        try:
            self.store = named_store(pairs, kind)
        except (DimefmError, SchemaError, OSError) as error:
            reason = error.what if isinstance(error, DimefmError) else str(error)
            shown = "pictures and keys" if kind == "image" else "sentences"
            self.warnings = [Words(f"The {shown} cannot be shown, only numbers of rows: {reason}", warning=True)]

    def words(self, rows_N: np.ndarray[Any, Any], column: str) -> dict[int, str]:
        """By row, what is in a column of the plan; the number of the row where the store cannot be opened."""
        wanted_N = np.unique(rows_N[rows_N >= 0])
        if self.store is None:
            return {row: f"row {row:,}" for row in wanted_N.tolist()}
        samples = self.store.samples(wanted_N, (column,))
        return {int(one["row"]): short(one[column]) for one in samples}


def _sample(pairs: Pairs) -> _Sample:
    """Images from parts at random places of shards that are spread evenly over the finished ones."""
    shards = np.array(sorted(pairs.committed()), np.int64)
    if len(shards) > _SHARDS:
        shards = shards[np.linspace(0, len(shards) - 1, _SHARDS).round().astype(np.int64)]
    rng, parts = np.random.default_rng(0), list[_Sample]()
    for shard in shards.tolist():
        start, stop = pairs.schema.shard_range(shard)
        part = -(-_SAMPLE // len(shards))
        at = start + int(rng.integers(0, max(1, stop - start - part + 1)))
        end = min(at + part, stop)
        text_NK, score_NK = pairs.text_rows(at, end), pairs.scores(at, end)
        good_N = text_NK[:, 0] >= 0
        parts.append(_Sample(np.arange(at, end)[good_N], text_NK[good_N], score_NK[good_N].astype(np.float32)))
    if not parts:
        width = pairs.schema.top_k
        return _Sample(np.empty(0, np.int64), np.empty((0, width), np.int32), np.empty((0, width), np.float32))
    return _Sample(*map(np.concatenate, zip(*parts, strict=True)))


def _scores(pairs: Pairs, sample: _Sample) -> list[Block]:
    """The best score of each image, and how scores fall with their rank."""
    best_N = sample.score_NK[:, 0]
    more = max(0.0, 0.02 - float(best_N.max() - best_N.min())) / 2
    counts, edges = np.histogram(best_N, _BINS, (float(best_N.min()) - more, float(best_N.max()) + more))
    of = f"of {len(best_N):,} of {pairs.schema.rows:,} images, from parts at random places of the store"
    blocks: list[Block] = [
        histogram(
            "Best score of each image", edges.tolist(), [("images", counts.tolist())], "cosine", "images", note=of
        )
    ]
    if pairs.schema.top_k > 1:
        mean_K = np.nanmean(np.where(sample.text_NK >= 0, sample.score_NK, np.nan), axis=0)
        points = [(rank, score) for rank, score in enumerate(mean_K.tolist(), 1)]
        blocks.append(line_chart("Mean score by rank", [Line("mean", points)], "rank", "cosine", note=of))
    return blocks


def _hits(hits_T: np.ndarray[Any, Any]) -> Block:
    """How many sentences have how many hits."""
    total, found, most = int(hits_T.sum(dtype=np.int64)), int(np.count_nonzero(hits_T)), int(hits_T.max())
    edges = [1 << n for n in range(most.bit_length() + 1)]
    counts = [int(np.count_nonzero((hits_T >= edge) & (hits_T < 2 * edge))) for edge in edges[:-1]]
    top = -(-len(hits_T) // 100)
    share = int(np.partition(hits_T, len(hits_T) - top)[len(hits_T) - top :].sum(dtype=np.int64)) / total
    note = (
        f"{found:,} of {counted(len(hits_T), 'sentence')} are found, {found / len(hits_T):.1%}, and drawn here. The 1% "
    )
    note += f"with most hits, {top:,}, have {share:.1%} of all {total:,} hits."
    title = "Sentences by how many images have them"
    return histogram(title, edges, [("sentences", counts)], "hits", "sentences", log_across=True, note=note)


def _most_hit(hits_T: np.ndarray[Any, Any], texts: _Named) -> Block:
    rows_N = _largest(hits_T, _MOST_HIT)
    words, most = texts.words(rows_N, "text"), int(hits_T[rows_N[0]])
    rows = [
        (words[row], Cell(f"{hits_T[row]:,}", int(hits_T[row]), share=int(hits_T[row]) / most), f"{row:,}")
        for row in rows_N.tolist()
        if hits_T[row]
    ]
    return Table(("sentence", "hits", "row"), rows, "lrr", f"The {counted(len(rows), 'sentence')} with most hits")


def _largest(value_T: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """The places of the largest values, the largest first; a part at a time, as an order of all takes much memory."""
    best = np.empty(0, np.int64)
    for at in range(0, len(value_T), _BLOCK):
        block = value_T[at : at + _BLOCK]
        best = np.concatenate([best, at + np.argpartition(block, -min(count, len(block)))[-count:]])
        best = best[np.argsort(-value_T[best].astype(np.int64), kind="stable")][:count]
    return best


def _galleries(sample: _Sample, images: _Named, texts: _Named) -> list[Block]:
    """Images with their first sentences: those of the best and of the worst scores, and some at random."""
    order_N = np.argsort(-sample.score_NK[:, 0], kind="stable")
    best, rest = order_N[:_CARDS], order_N[_CARDS:]
    worst, rest = rest[::-1][:_CARDS], rest[: max(0, len(rest) - _CARDS)]
    chance = np.sort(np.random.default_rng(0).permutation(rest)[:_CARDS])
    shown = np.concatenate([best, worst, chance])
    rows_N, text_NK = sample.row_N[shown], sample.text_NK[shown, :_SENTENCES]
    keys, sentences = images.words(rows_N, "key"), texts.words(text_NK, "text")
    pictures = Pictures(images.store) if images.store else None
    drawn = pictures.of(rows_N) if pictures else [None] * len(rows_N)
    cards = []
    for place, row, image in zip(shown.tolist(), rows_N.tolist(), drawn, strict=True):
        scored = zip(sample.text_NK[place, :_SENTENCES].tolist(), sample.score_NK[place].tolist(), strict=False)
        lines = [f"{score:.3f} {short(sentences[text], _LETTERS)}" for text, score in scored if text >= 0]
        cards.append(Card(image, keys[row], lines))
    of = f"of {len(order_N):,} sampled images"
    blocks: list[Block] = [*(pictures.notes() if pictures else [])]
    blocks.append(Gallery(cards[: len(best)], f"The best {of}"))
    if len(worst):
        blocks.append(Gallery(cards[len(best) : len(best) + len(worst)], f"The worst {of}"))
    if len(chance):
        blocks.append(Gallery(cards[len(best) + len(worst) :], f"Some at random {of}"))
    return blocks
