"""Sections about a selection of images: what was kept and what was not, with pictures of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_schemas import Status
from cache_schemas.image_selection import ImageSelection
from cache_schemas.text_selection import SELECTION_FILE
from dimefm.errors import MismatchError
from dimefm.inspection.describe_retrieval import may_open
from dimefm.inspection.info import examine
from dimefm.pages.charts import Bar, bar_chart, histogram
from dimefm.pages.leaks_page import leaks_sections
from dimefm.pages.page import Block, Card, Cell, Facts, Gallery, Section, Table, Words
from dimefm.pages.pictures import Pictures
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from dimefm.system import storage

_SHEET, _GROUPS, _PER_GROUP, _SOURCES = 24, 12, 6, 200
_SHOWN_BELOW = ("of", "left out", "", "read more", "stand for")  # lines of info that the charts and tables have


def image_selection_sections(paths: Sequence[str]) -> list[Section]:
    """Sections for each selection. One that is unfinished is described in words."""
    sections = []
    for path in paths:
        described = examine(path)
        blocks: list[Block] = [Facts([row for row in described.rows if row[0] not in _SHOWN_BELOW])]
        more = list[Section]()
        if storage.exists(storage.join(path, SELECTION_FILE)):
            selected = SelectedImages(path)
            blocks += _charts(selected.document)
            images = _images(selected)
            if images is None:
                what = f"The image store {selected.document.plan.images} is not there, or is another one now,"
                blocks.append(Words(f"{what} so there are no pictures of its images.", warning=True))
            more = leaks_sections(selected.path, images) or (_pictures(selected, images) if images else [])
        sections += [Section(described.title, blocks), *more]
    return sections


def _charts(found: ImageSelection) -> list[Block]:
    counts = [("kept", found.kept), *found.dropped.items()]
    bars = [Bar(count, f"{count:,}, {count / found.rows:.1%}") for _, count in counts]
    blocks: list[Block] = [
        bar_chart("What became of the images", [name for name, _ in counts], [("images", bars)], "images")
    ]
    if found.groups.keys() - {"1"}:
        sizes = [Bar(count, f"{count:,}") for count in found.groups.values()]
        note = "Images that stand for themselves alone are not drawn."
        alike = [(size, bar) for size, bar in zip(found.groups, sizes, strict=True) if size != "1"]
        blocks.append(
            bar_chart("How many images a kept one stands for", [size for size, _ in alike],
                      [("kept", [bar for _, bar in alike])], "kept images", note=note)
        )  # fmt: skip
    if shown := found.histogram:
        layers = [("kept", shown.kept), ("dropped", shown.dropped)]
        blocks.append(histogram("Images by what ranks them", shown.edges, layers, shown.of, "images"))
    rows = []
    for one in sorted(found.sources, key=lambda source: (-source.rows, source.file))[:_SOURCES]:
        share = one.kept / max(1, one.rows)
        of = (
            Cell(f"{one.rows:,}", one.rows),
            Cell(f"{one.kept:,}", one.kept),
            Cell(f"{share:.1%}", share, share=share),
        )
        rows.append((one.file or "(none)", *of))
    more = f", the first {_SOURCES} of {len(found.sources):,}" if len(found.sources) > _SOURCES else ""
    return [*blocks, Table(("source", "images", "kept", "share"), rows, "lrrr", f"Sources{more}")]


def _images(selected: SelectedImages) -> Store | None:
    """The image store, if it is there, is still the one that was selected from, and may be opened."""
    where = selected.document.plan.images
    if not may_open(selected.path, where) or not storage.exists(where):
        return None
    store = Store(where)
    try:
        selected.require_store(store)
    except MismatchError:
        return None
    return store


def _pictures(selected: SelectedImages, images: Store) -> list[Section]:
    """Contact sheets, and the largest groups of images that are alike."""
    pictures, kept_K, rng = Pictures(images), selected.rows(), np.random.default_rng(0)
    table = selected.copies()
    row_R, like_R = table["row"].to_numpy(), table["like"].to_numpy()
    same = set(row_R[table["same_bytes"].to_numpy(zero_copy_only=False)].tolist())
    blocks: list[Block] = [*_groups(images, pictures, row_R, like_R, same)]
    dropped = _dropped_sample(images, kept_K, row_R, rng)
    blocks.append(_sheet(images, pictures, rng.choice(kept_K, min(_SHEET, len(kept_K)), replace=False), "Kept", "good"))
    if len(dropped):
        title = "Left out for another reason than that they repeat one" if len(row_R) else "Left out"
        blocks.append(_sheet(images, pictures, dropped, title, "bad"))
    return [Section("Pictures", [*pictures.notes(), *blocks])]


def _groups(images: Store, pictures: Pictures, row_R: Any, like_R: Any, same: set[int]) -> list[Gallery]:
    """The largest groups, and some groups at random: the kept image first."""
    likes, counts = np.unique(like_R, return_counts=True)
    largest = likes[np.argsort(-counts, kind="stable")][:_GROUPS]
    others = np.setdiff1d(likes, largest)
    drawn = np.random.default_rng(1).choice(others, min(_GROUPS, len(others)), replace=False)
    found = []
    for title, chosen in (("The largest groups of images that are alike", largest), ("Some more groups", drawn)):
        cards = list[Card]()
        for like in chosen.tolist():
            members = row_R[like_R == like]
            rows = np.r_[like, members[:_PER_GROUP]]
            keys = [one["key"] for one in images.samples(rows, ("key",))]
            for row, key, image in zip(rows.tolist(), keys, pictures.of(rows), strict=True):
                said = f"kept, of {len(members) + 1:,}" if row == like else "left out"
                said += ", the same bytes" if row in same else ""
                cards.append(Card(image, key, [said], "good" if row == like else "bad"))
        if cards:
            found.append(Gallery(cards, title))
    return found


def _dropped_sample(images: Store, kept_K: Any, row_R: Any, rng: np.random.Generator) -> Any:
    """Some images that were left out and repeat none."""
    left_T = images.status() == Status.OK
    left_T[kept_K] = left_T[row_R] = False
    rows = np.flatnonzero(left_T)
    return rng.choice(rows, min(_SHEET, len(rows)), replace=False)


def _sheet(images: Store, pictures: Pictures, rows: Any, title: str, mark: Any) -> Gallery:
    rows = np.sort(rows)
    keys = [one["key"] for one in images.samples(rows, ("key",))]
    cards = [Card(image, key, (), mark) for key, image in zip(keys, pictures.of(rows), strict=True)]
    return Gallery(cards, f"{title}: {len(cards)} at random")
