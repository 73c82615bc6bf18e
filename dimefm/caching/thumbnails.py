"""Small pictures of images: of some rows of an image store, from its own JPEGs or the files that it was cached from,
or of images whose places are known.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_schemas.plan import FILES_TABLE
from dimefm.caching.images_of import images_of
from dimefm.errors import DimefmError
from dimefm.images.decode import DecodeError
from dimefm.images.thumbnail import thumbnail
from dimefm.sources.parquet import split_column
from dimefm.sources.read_image import EncodedImage, ImagePlace, read_encoded
from dimefm.store.embedding_store import Store

_CHANGED = "its file is another one than when it was cached"
_THREADS = 8  # most of them wait for storage


def thumbnails(store: Store, rows_N: np.ndarray[Any, Any], side: int) -> Iterator[bytes | str]:
    """For each row, in the order asked for, a JPEG whose longer side has at most `side` pixels; or in words why there
    is none. Each file is asked once."""
    ascending_M, place_N = np.unique(np.asarray(rows_N, np.int64), return_inverse=True)
    if store.schema.pixels:
        places = [ImagePlace(*place) for place in store.pixel_places(ascending_M)]
    else:
        places = [ImagePlace(one.file, one.offset, one.size) for one in images_of(store, ascending_M)]
    changed = _changed(store, {split_column(place.file)[0] for place in places})
    good = [place for place in places if split_column(place.file)[0] not in changed]
    pictures = iter(thumbnails_at(good, side))
    found = [_CHANGED if split_column(place.file)[0] in changed else next(pictures) for place in places]
    yield from (found[place] for place in place_N.tolist())


def _changed(store: Store, files: set[str]) -> set[str]:
    """Of these files, the local ones that have another size than when the store was planned: an image that is read
    where another one was would be shown below the wrong name."""
    if store.schema.pixels or FILES_TABLE not in store.schema.digests:
        return set()
    table = store.source_files()
    table = table.filter(pc.is_in(table["path"], pa.array(sorted(files))))
    sizes = zip(table["path"].to_pylist(), table["size"].to_pylist(), strict=True)
    return {path for path, size in sizes if Path(path).is_file() and Path(path).stat().st_size != size}


def thumbnails_at(places: Sequence[EncodedImage], side: int) -> list[bytes | str]:
    """As `thumbnails`, of images at these places."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda place: _thumbnail(place, side), places))


def _thumbnail(place: EncodedImage, side: int) -> bytes | str:
    if not place.file:
        return "it was imported without its image"
    if not place.size and split_column(place.file)[1] is None:
        return "it has no bytes"
    try:
        return thumbnail(read_encoded(place), side)
    except DimefmError as error:
        return error.what
    except (DecodeError, OSError) as error:
        return str(error)
