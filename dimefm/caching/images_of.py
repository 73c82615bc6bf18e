"""Where the rows of a store are read from when they are encoded: as they were planned, or, for views that are added to
a store with pixels, from its JPEGs, which are what the views are drawn on.

Shapes: N rows in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cache_schemas.plan import PlannedImage, planned_rows
from dimefm.store.added_views import is_addition, parent_path
from dimefm.store.embedding_store import Store


def images_of(store: Store, rows_N: np.ndarray[Any, Any]) -> list[Any]:
    """The PlannedImages, or PlannedTexts, of some rows. Of a row without a JPEG there is nothing to read."""
    rows = planned_rows(store.entries(rows_N)) if len(rows_N) else []
    if not is_addition(store.schema):
        return rows
    whole = Store(parent_path(store.path, store.schema), additions=0)
    if not whole.schema.pixels:
        return rows
    places = whole.pixel_places(rows_N)
    return [row._replace(file=file, offset=at, size=size) for row, (file, at, size) in zip(rows, places, strict=True)]


def other_images(store: Store, images: list[PlannedImage] | None = None) -> Callable[[int], PlannedImage]:
    """Gives the image of a row that views are mixed with: one of `images`, or else of the row's shard."""
    known = {image.row: image for image in images or []}

    def other(row: int) -> PlannedImage:
        if row not in known:
            shard = images_of(store, np.arange(*store.schema.shard_range(row // store.schema.shard_rows)))
            for image in shard:
                known.setdefault(image.row, image)
        return known[row]

    return other
