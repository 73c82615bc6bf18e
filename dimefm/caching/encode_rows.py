"""From rows of a plan to what a shard stores of them: read, decode, run the teacher, note why a row has no embedding.

Shapes: N rows, B images or sentences in a batch, V views, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from time import monotonic
from typing import Any

import numpy as np
import torch

from cache_schemas import EmbeddingStore, Status
from cache_schemas.embedding_store import EMBEDDING, PIXEL_INDEX, STATUS, VIEW
from cache_schemas.plan import PlannedImage, PlannedText
from dimefm.caching.gpu_image_loader import GpuLoader, open_loader
from dimefm.caching.image_loader import NOTHING_KNOWN, Known, Loader
from dimefm.images.decode import DecodeError
from dimefm.models.clip import Clip, token_counts
from dimefm.store.pixel_tar import PixelTar
from dimefm.system.transfer import Arriving, fetch

Rows = list[Any]
"""All PlannedImage, or all PlannedText."""

OnRows = Callable[[int], None]
"""Called with the number of further rows that are done."""

_UNSHARED = nullcontext()  # the `turn` of a teacher that only one shard uses


def _silent(rows: int) -> None:
    """Report no progress."""


@dataclass
class ShardData:
    """What is stored for some rows: the store's arrays by name, (N, ...), and by place why a row has no embedding.
    `waited`: the seconds in which another shard had the teacher."""

    arrays: dict[str, np.ndarray[Any, Any]]
    reasons: dict[int, str] = field(default_factory=dict)
    waited: float = 0.0

    @classmethod
    def empty(cls, rows: int, schema: EmbeddingStore) -> ShardData:
        """All rows pending."""
        return cls({name: np.zeros((rows, *spec.shape[1:]), spec.dtype) for name, spec in schema.arrays().items()})

    def failed(self) -> np.ndarray[Any, Any]:
        """The places of the rows without an embedding."""
        return np.flatnonzero(self.arrays[STATUS] != Status.OK)

    def fail(self, place: int, status: Status, reason: str) -> None:
        """Leave a row without an embedding."""
        self.arrays[STATUS][place], self.reasons[place] = status, reason

    def replace(self, places: np.ndarray[Any, Any], again: ShardData) -> None:
        """Take the rows at these places from `again`, which has them encoded again; no other row may have failed."""
        for name, values in again.arrays.items():
            self.arrays[name] = self.arrays[name].copy()
            self.arrays[name][places] = values
        self.reasons = {int(places[at]): reason for at, reason in again.reasons.items()}
        self.waited = again.waited


def encode_rows(
    rows: Rows,
    schema: EmbeddingStore,
    clip: Clip,
    *,
    threads: int = 1,
    progress: OnRows = _silent,
    tar: PixelTar | None = None,
    turn: AbstractContextManager[Any] = _UNSHARED,
    accept_missing: bool = False,
    known: Known = NOTHING_KNOWN,
) -> ShardData:
    """Encode these rows of a plan; with pixels, their JPEGs are added to `tar`. Which rows share a batch depends on the
    data alone, never on timing, so that a second run gives the same bytes. Rows that overflow float16 are computed
    again in float32. `turn` and `accept_missing`: see encode_planned.How. `known`: see caching.image_loader."""
    data, wide, done = ShardData.empty(len(rows), schema), None, 0
    batches = _text_batches(rows, schema, clip)
    if schema.kind == "image":
        loader = open_loader(schema, clip.device, accept_missing=accept_missing, known=known)
        batches = _image_batches(rows, schema, clip, loader, threads, data, tar)
    with closing(batches):
        first, asked = list(islice(batches, 1)), monotonic()
        with turn:
            data.waited = monotonic() - asked
            for batch, arriving in _send_ahead(chain(first, batches), schema, clip):
                left = _write_results(data, batch, arriving)
                if left.places and schema.teacher.precision == "fp16":
                    wide = wide or clip.in_float32()
                    left = _write_results(data, left, _send(left, schema, wide))
                for place in left.places:
                    data.fail(place, Status.NOT_FINITE, "the teacher's embedding is NaN, infinite or zero")
                progress(len(batch.places))
                done += len(batch.places)
    progress(len(rows) - done)
    return data


@dataclass(frozen=True)
class _Batch:
    """Some rows by their places, and what the teacher takes: pixels (B V, 3, H, W) or tokens (B, L)."""

    places: list[int]
    inputs: torch.Tensor


def _send_ahead(batches: Iterator[_Batch], schema: EmbeddingStore, clip: Clip) -> Iterator[tuple[_Batch, Arriving]]:
    """Send each batch to the teacher before the results of the batch before it are yielded: a GPU computes while they
    are fetched and written. A batch without rows counts as well, so that the loader's buffers are reused in time."""
    before: tuple[_Batch, Arriving] | None = None
    for batch in batches:
        now = (batch, _send(batch, schema, clip)) if batch.places else None
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def _send(batch: _Batch, schema: EmbeddingStore, clip: Clip) -> Arriving:
    """Through the teacher: embeddings (B V, D) in the store's type, and which of them are valid, bool (B V,)."""
    encode = clip.encode_images if schema.kind == "image" else clip.encode_tokens
    features_ND = encode(batch.inputs)
    good_N = torch.isfinite(features_ND).all(dim=1) & (features_ND.norm(dim=1) > 0.5)
    return fetch(features_ND.to(torch.float16 if schema.dtype == "float16" else torch.float32), good_N)


def _write_results(data: ShardData, batch: _Batch, arriving: Arriving) -> _Batch:
    """Put the results of a batch into `data`; returns the rest of the batch: the rows without a valid embedding."""
    values_ND, good_N = (tensor.numpy() for tensor in arriving.wait())
    good_BV = good_N.reshape(len(batch.places), -1)
    good_B, places_B = good_BV.all(axis=1), np.array(batch.places)
    embedding = data.arrays[EMBEDDING]
    embedding[places_B[good_B]] = values_ND.reshape(len(places_B), *embedding.shape[1:])[good_B]
    data.arrays[STATUS][places_B[good_B]] = Status.OK
    if good_B.all():
        return _Batch([], batch.inputs[:0])
    left_N = torch.from_numpy(np.repeat(~good_B, good_BV.shape[1]))
    return _Batch(places_B[~good_B].tolist(), batch.inputs[left_N])


def _text_batches(texts: list[PlannedText], schema: EmbeddingStore, clip: Clip) -> Generator[_Batch, None, None]:
    """Batches of sentences of similar length, so that little of a batch is padding."""
    tokens_NL = clip.tokenize([planned.text for planned in texts])
    order = np.argsort(token_counts(tokens_NL), kind="stable")
    for at in range(0, len(texts), schema.batch_size):
        places = order[at : at + schema.batch_size]
        yield _Batch(places.tolist(), tokens_NL[torch.from_numpy(places)])


def _image_batches(
    images: list[PlannedImage],
    schema: EmbeddingStore,
    clip: Clip,
    loader: Loader | GpuLoader,
    threads: int,
    data: ShardData,
    tar: PixelTar | None,
) -> Generator[_Batch, None, None]:
    """Batches of decoded images. An image that could not be read or decoded gets its status and reason here."""
    size, at = max(1, schema.batch_size // (schema.views.count if schema.views else 1)), 0
    for loaded, pixels_N3HW in loader.batches(images, size, threads, pin=clip.device.type == "cuda"):
        places = []
        for place, one in enumerate(loaded, at):
            if isinstance(one, DecodeError):
                data.fail(place, one.status, str(one))
                continue
            if one.views_VP is not None:
                data.arrays[VIEW][place] = one.views_VP
            if tar is not None and one.jpeg is not None:
                data.arrays[PIXEL_INDEX][place] = tar.add(images[place].row, one.jpeg)
            places.append(place)
        yield _Batch(places, pixels_N3HW)
        at += len(loaded)
