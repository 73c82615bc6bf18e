"""From a row of an image plan to what the teacher sees and what is stored beside its embedding.

Shapes: V views (1 without), H height, W width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache_schemas import EmbeddingStore, Status
from dimefm import storage
from dimefm.decode import DecodeError, decode_rgb, to_tensor
from dimefm.errors import StoreError
from dimefm.pixels import small_jpeg
from dimefm.preprocess import Preprocess
from dimefm.sources.reading import read_encoded
from dimefm.views import draw_boxes, replay

_TASK = 8  # images a task of the thread pool: one each would cost as much as reading it
_WAITS = (0.5, 2.0)  # seconds before a failed read is tried again


@dataclass(frozen=True)
class Loaded:
    """uint8 (V, 3, H, W) for the teacher; with views their boxes int32 (V, 5); with pixels the JPEG to keep."""

    pixels_V3HW: torch.Tensor
    boxes_V5: np.ndarray[Any, Any] | None = None
    jpeg: bytes | None = None


class Loader:
    """Reads and decodes the images of a store's plan. Safe in threads."""

    def __init__(self, schema: EmbeddingStore) -> None:
        self._views, self._side = schema.views, schema.pixels
        self._preprocess = Preprocess(schema.teacher.preprocessing, exact=schema.decoder == "pillow")

    def load(self, row: dict[str, Any]) -> Loaded | DecodeError:
        """One image, or why it cannot be had. Raises StoreError where the storage does not answer."""
        try:
            data = _read(row)
            return self._decode(data, row["row"])
        except storage.GONE as error:
            return DecodeError(Status.MISSING, str(error))
        except DecodeError as error:
            return error

    def load_all(self, rows: list[dict[str, Any]], threads: int, ahead: int) -> Iterator[Loaded | DecodeError]:
        """The images of `rows` in order, decoded on threads at most `ahead` rows before they are needed."""
        waiting: deque[Future[list[Loaded | DecodeError]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for at in range(0, len(rows), _TASK):
                waiting.append(pool.submit(self._load_some, rows[at : at + _TASK]))
                if len(waiting) > -(-ahead // _TASK):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _load_some(self, rows: list[dict[str, Any]]) -> list[Loaded | DecodeError]:
        return [self.load(row) for row in rows]

    def _decode(self, data: bytes, row: int) -> Loaded:
        image = self._preprocess.decode(data)
        jpeg = small_jpeg(data, image, self._side) if self._side else None
        if not self._views:
            return Loaded(self._preprocess.apply(image)[None], None, jpeg)
        # Views are drawn on what the trainer will decode: the kept JPEG, where there is one.
        if jpeg is not None and jpeg is not data:
            image_3HW = decode_rgb(jpeg)
        else:
            image_3HW = image if isinstance(image, torch.Tensor) else to_tensor(image)
        boxes_V5 = draw_boxes(self._views, row, *image_3HW.shape[-2:])
        facts = self._preprocess.facts
        return Loaded(torch.stack([replay(image_3HW, box, facts.size, facts) for box in boxes_V5]), boxes_V5, jpeg)


def _read(row: dict[str, Any]) -> bytes:
    """The bytes of a sample. Storage that fails for the moment is asked again, and at last ends the job: a row is
    given up for good only where its file is gone."""
    for wait in (*_WAITS, None):
        try:
            data = read_encoded(row["file"], row["offset"], row["size"])
            break
        except storage.GONE:
            raise
        except OSError as error:
            if wait is None:
                what = f"{row['file']} cannot be read: {error}"
                raise StoreError(what, remedy="run the same command again once the storage answers") from error
            time.sleep(wait)
    if len(data) < row["size"] and not row["file"].endswith(".tsv"):
        raise DecodeError(Status.TRUNCATED, f"the file ends after {len(data):,} of {row['size']:,} bytes")
    return data
