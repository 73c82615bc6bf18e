"""Sections about leaks: how many images of each test set are trained on, and the pairs side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas.evaluation import FEATURES
from cache_schemas.leaks import LEAKED_FILE, LEAKS_FILE, Leaks
from dimefm.pages.charts import Bar, bar_chart
from dimefm.pages.page import Block, Card, Cell, Gallery, Mark, Section, Table
from dimefm.pages.pictures import Pictures
from dimefm.store.embedding_store import Store
from dimefm.store.parquet_tables import require_digest
from dimefm.system import storage

_PAIRS, _NEAR_MISSES = 60, 12  # of each set


def leaks_sections(path: str, images: Store | None) -> list[Section]:
    """A table of the sets, and for each set its leaks; nothing for a selection that `leaks` did not write. Without
    `images` there are no pictures of training images."""
    where = storage.join(path, LEAKS_FILE)
    if not storage.exists(where):
        return []
    found = Leaks.parse(storage.read_json(where), where)
    data = require_digest(storage.join(path, LEAKED_FILE), found.digest, "run dimefm leaks again, into another --out")
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    sections = [Section("Test images that are trained on", [_sets(found), _shares(found)])]
    for one in found.sets:
        pairs = sorted(table.filter(pa.compute.equal(table["set"], one.title)).to_pylist(), key=_rank)
        if pairs:
            sections.append(Section(f"Pairs of {one.title}", _pairs(path, one.title, images, pairs, found)))
    return sections


def _rank(pair: dict[str, Any]) -> tuple[bool, float]:
    """The most alike first, those that could not be read last."""
    value = pair["similarity"]
    return value is None, -(value or 0.0)


def _sets(found: Leaks) -> Table:
    rows = list[tuple[str | Cell, ...]]()
    for one in found.sets:
        share = one.leaked / max(1, one.images)
        counts = [Cell(f"{count:,}", count) for count in (one.images, one.leaked)]
        more = [Cell(f"{count:,}", count) for count in (one.candidates, one.unread)]
        rows.append((one.title, *counts, Cell(f"{share:.2%}", share, share=share), *more))
    head = ("test set", "images", "also trained on", "share", "pairs looked at", "could not be read")
    caption = f"{found.rows:,} training images stand in these sets: a cosine of {found.cosine:g} or more, and alike by"
    return Table(head, rows, "lrrrrr", f"{caption} {found.similarity:g} or more of 1")


def _shares(found: Leaks) -> Block:
    bars = [Bar(100 * one.leaked / max(1, one.images), f"{one.leaked / max(1, one.images):.2%}") for one in found.sets]
    return bar_chart("Share of each test set that is trained on", [one.title for one in found.sets],
                     [("leaked", bars)], "%")  # fmt: skip


def _pairs(path: str, title: str, images: Store | None, pairs: list[dict[str, Any]], found: Leaks) -> list[Block]:
    """Galleries of a set: the leaks, and what just was none."""
    leaks = [pair for pair in pairs if pair["leak"]]
    misses = [pair for pair in pairs if not pair["leak"] and pair["similarity"] is not None][:_NEAR_MISSES]
    tested = Pictures(Store(storage.join(path, f"{FEATURES}/{title}.zarr")))
    trained = Pictures(images) if images else None
    blocks = list[Block]()
    shown: list[tuple[str, list[dict[str, Any]], Mark]] = [
        ("Leaks", leaks[:_PAIRS], "bad"),
        ("Most alike, but no leaks", misses, "good"),
    ]
    for what, chosen, mark in shown:
        if not chosen:
            continue
        left = tested.of(np.array([pair["test_row"] for pair in chosen]))
        right = trained.of(np.array([pair["row"] for pair in chosen])) if trained else [None] * len(chosen)
        cards = [
            Card(test, pair["test_key"], (f"trained on: {pair['key']}", _said(pair)), mark, [train])
            for pair, test, train in zip(chosen, left, right, strict=True)
        ]
        more = f", the first {_PAIRS:,} of {len(leaks):,} pairs" if what == "Leaks" and len(leaks) > _PAIRS else ""
        blocks.append(Gallery(cards, f"{what}{more}: each test image, and beside it the training image"))
    return [*tested.notes(), *(trained.notes() if trained else []), *blocks]


def _said(pair: dict[str, Any]) -> str:
    return f"alike {pair['similarity']:.2f}, cosine {pair['cosine']:.2f}, row {pair['row']:,}"
