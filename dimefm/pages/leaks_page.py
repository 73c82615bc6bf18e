"""Sections about leaks: how many images of each test set are trained on, and the pairs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schemas.evaluation import FEATURES
from cache_schemas.leaks import LEAKS_FILE, Leaks
from dimefm.inspection.info import examine
from dimefm.pages.charts import Bar, bar_chart
from dimefm.pages.page import Block, Card, Cell, Facts, Gallery, Mark, Section, Table, Words
from dimefm.pages.pictures import Pictures
from dimefm.store.embedding_store import Store
from dimefm.store.leaked_rows import read_leaks, read_pairs, unreadable_images
from dimefm.system import storage

_PAIRS, _NEAR_MISSES, _SENTENCES = 60, 12, 300  # of each set


def leaks_sections(path: str, images: Store | None) -> list[Section]:
    """A table of the sets, and for each set its leaks; nothing for a selection that `leaks` did not write. Without
    `images` there are no pictures of training images."""
    if not storage.exists(storage.join(path, LEAKS_FILE)):
        return []
    found = read_leaks(path)
    table = read_pairs(path, found)
    tested = "images" if found.kind == "image" else "captions"
    unreadable = [Words(text, warning=True) for text in unreadable_images(found)]
    sections = [Section(f"Test {tested} that are trained on", [_sets(found), *unreadable, _shares(found)])]
    for one in found.sets:
        pairs = sorted(table.filter(pa.compute.equal(table["set"], one.title)).to_pylist(), key=_rank)
        if pairs:
            blocks = _pairs(path, one.title, images, pairs, found) if found.kind == "image" else [_sentences(pairs)]
            sections.append(Section(f"Pairs of {one.title}", blocks))
    return sections


def text_leaks_sections(paths: Sequence[str]) -> list[Section]:
    """Sections for leaks of text stores."""
    sections = []
    for path in paths:
        described = examine(path)
        sections += [Section(described.title, [Facts(described.rows)]), *leaks_sections(path, None)]
    return sections


def _sentences(pairs: list[dict[str, Any]]) -> Table:
    """The pairs of captions and sentences, by key: the most alike first."""
    rows = [
        (
            Cell(f"{pair['similarity']:.2f}", pair["similarity"], mark="bad" if pair["leak"] else ""),
            Cell(f"{pair['cosine']:.3f}", pair["cosine"]),
            pair["test_key"],
            pair["key"],
            "leak" if pair["leak"] else "",
        )
        for pair in pairs[:_SENTENCES]
    ]
    caption = f"Captions and sentences, the most alike {len(rows):,} of {len(pairs):,} pairs"
    return Table(("words in common", "cosine", "caption", "sentence", ""), rows, "rrlll", caption)


def _rank(pair: dict[str, Any]) -> tuple[bool, float]:
    """The most alike first, those that could not be read last."""
    value = pair["similarity"]
    return value is None, -(value or 0.0)


def _sets(found: Leaks) -> Table:
    rows = list[tuple[str | Cell, ...]]()
    for one in found.sets:
        share = one.leaked / max(1, one.tested)
        counts = [Cell(f"{count:,}", count) for count in (one.tested, one.leaked)]
        more = [Cell(f"{count:,}", count) for count in (one.candidates, one.unread)]
        rows.append((one.title, *counts, Cell(f"{share:.2%}", share, share=share), *more))
    what, tested = ("images", "images") if found.kind == "image" else ("sentences", "captions")
    head = ("test set", tested, "also trained on", "share", "pairs looked at", "pairs unreadable")
    caption = f"{found.rows:,} training {what} stand in these sets: a cosine of {found.cosine:g} or more, and alike by"
    return Table(head, rows, "lrrrrr", f"{caption} {found.similarity:g} or more of 1")


def _shares(found: Leaks) -> Block:
    bars = [Bar(100 * one.leaked / max(1, one.tested), f"{one.leaked / max(1, one.tested):.2%}") for one in found.sets]
    return bar_chart("Share of each test set that is trained on", [one.title for one in found.sets],
                     [("leaked", bars)], "%")  # fmt: skip


def _pairs(path: str, title: str, images: Store | None, pairs: list[dict[str, Any]], found: Leaks) -> list[Block]:
    """Galleries of a set: the leaks, and what just was none."""
    leaks = [pair for pair in pairs if pair["leak"]]
    misses = [pair for pair in pairs if not pair["leak"] and pair["similarity"] is not None][:_NEAR_MISSES]
    features = storage.join(path, f"{FEATURES}/{title}.zarr")
    tested = Pictures(Store(features)) if storage.exists(features) else None
    trained = Pictures(images) if images else None
    blocks = list[Block]()
    shown: list[tuple[str, list[dict[str, Any]], Mark]] = [
        ("Leaks", leaks[:_PAIRS], "bad"),
        ("Most alike, but no leaks", misses, "good"),
    ]
    for what, chosen, mark in shown:
        if not chosen:
            continue
        left, right = _pictures(tested, chosen, "test_row"), _pictures(trained, chosen, "row")
        cards = [
            Card(test, pair["test_key"], (f"trained on: {pair['key']}", _said(pair)), mark, [train])
            for pair, test, train in zip(chosen, left, right, strict=True)
        ]
        more = f", the first {_PAIRS:,} of {len(leaks):,} pairs" if what == "Leaks" and len(leaks) > _PAIRS else ""
        blocks.append(Gallery(cards, f"{what}{more}: each test image, and beside it the training image"))
    gone = [] if tested else [Words(f"Test images cannot be shown: {features} is not there", warning=True)]
    return [*gone, *(note for one in (tested, trained) if one for note in one.notes()), *blocks]


def _pictures(store: Pictures | None, pairs: list[dict[str, Any]], row: str) -> Sequence[str | None]:
    return store.of(np.array([pair[row] for pair in pairs])) if store else [None] * len(pairs)


def _said(pair: dict[str, Any]) -> str:
    return f"alike {pair['similarity']:.2f}, cosine {pair['cosine']:.2f}, row {pair['row']:,}"
