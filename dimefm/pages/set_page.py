"""Sections about labelled sets: images per class, and a few images of each class, or images with their captions.

Shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_schemas.evaluation import SPLITS
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import find_folder
from dimefm.inspection.info import examine
from dimefm.pages.page import Block, Card, Cell, Facts, Gallery, Section, Table
from dimefm.pages.pictures import PicturesAt
from dimefm.pages.short_words import short, short_names
from dimefm.system.wording import counted

_CLASSES, _OF_EACH, _CAPTIONED, _LISTED = 24, 3, 36, 1000
_LETTERS = 110


def set_sections(paths: Sequence[str]) -> list[Section]:
    """What is in each set."""
    return [section for path, name in zip(paths, short_names(paths), strict=True) for section in _set(path, name)]


def _set(path: str, name: str) -> list[Section]:
    found = examine(path)
    splits = [images for split in SPLITS if (images := find_folder(path, split)) is not None]
    blocks: list[Block] = [Facts([("path", found.facts["path"]), *found.rows])]
    labelled = [images for images in splits if images.labels is not None]
    if len({images.classnames for images in labelled}) == 1:
        blocks.append(_per_class(labelled))
    else:
        blocks += [_per_class([images]) for images in labelled]
    sections = [Section(f"{name}: labelled set", blocks)]
    return [*sections, *(Section(f"{name}: {images.split} images", _gallery(images)) for images in splits)]


def _per_class(splits: Sequence[ImageSet]) -> Table:
    """The images of each class in each split, and their share of it; an image may be of several classes."""
    names, counts = splits[0].classnames, [_counts(images) for images in splits]
    places = np.arange(len(names))
    caption = "Images per class, and their share of the split"
    if len(names) > _LISTED:
        places = np.argsort(-np.sum(counts, axis=0), kind="stable")[:_LISTED]
        caption += f": the largest {_LISTED:,} of {len(names):,} classes"
    shares = [
        [_share(int(count_C[place]), len(images.samples), int(count_C.max())) for place in places]
        for images, count_C in zip(splits, counts, strict=True)
    ]
    rows = list(zip([short(names[place]) for place in places], *shares, strict=True))
    return Table(("class", *(images.split for images in splits)), rows, "l" + "r" * len(splits), caption)


def _share(count: int, images: int, most: int) -> Cell:
    return Cell(f"{count:,} ({count / images:.1%})", count, share=count / max(1, most))


def _counts(images: ImageSet) -> np.ndarray[Any, Any]:
    """The images of each class, int64 (C,)."""
    labels = images.class_labels
    return labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(images.classnames))


def _gallery(images: ImageSet) -> list[Block]:
    pictures, rng = PicturesAt(), np.random.default_rng(0)
    if images.captions is not None:
        chosen = np.sort(rng.permutation(len(images.samples))[:_CAPTIONED]).tolist()
        cards = [
            Card(image, short(images.samples[place].key), [short(one, _LETTERS) for one in images.captions[place][:5]])
            for place, image in zip(chosen, pictures.of([images.samples[place] for place in chosen]), strict=True)
        ]
        of = f"{len(cards):,} of {counted(len(images.samples), 'image')} at random, with their first captions"
        return [*pictures.notes(), Gallery(cards, of)]
    used = np.flatnonzero(_counts(images))
    classes = used[np.linspace(0, len(used) - 1, min(_CLASSES, len(used))).round().astype(np.int64)]
    shown = [(int(one), int(place)) for one in classes for place in _some(images, int(one), rng)]
    drawn = pictures.of([images.samples[place] for _, place in shown])
    cards = [
        Card(image, short(images.classnames[one]), [short(images.samples[place].key)])
        for (one, place), image in zip(shown, drawn, strict=True)
    ]
    of = f"{_OF_EACH} images at random of {len(classes):,} of {counted(len(used), 'class', 'classes')} with images"
    return [*pictures.notes(), Gallery(cards, of)]


def _some(images: ImageSet, label: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """The places of a few images of a class."""
    labels = images.class_labels
    places = np.flatnonzero(labels[:, label] if labels.ndim == 2 else labels == label)
    return np.sort(rng.permutation(places)[:_OF_EACH])
