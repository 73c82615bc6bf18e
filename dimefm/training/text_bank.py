"""The text batch of a step: teacher embeddings of sentences, drawn apart from the images.

Shapes: T texts, G images of the global batch, D width, N any rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from cache_schemas import Status
from dimefm.errors import TrainingError
from dimefm.store.embedding_store import Store, opened
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system.machine import available_memory, processes_here
from dimefm.training.before_training import require_sources
from dimefm.training.config import TextMix

CPU = torch.device("cpu")
_SHARE = 4  # sentences may take a quarter of the memory
_BLOCK = 2**18  # rows
_Rows = np.ndarray[Any, Any]
_NONE_RETRIEVED = "no sentence was retrieved for any image of the batch"
_NO_ROWS: _Rows = np.empty(0, np.int32)


@dataclass(frozen=True)
class DrawnTexts:
    """The texts of a step: rows int64 (T,) of the text store, and their embeddings as stored (T, D). If each image's
    own sentence is wanted, also its row (G,), -1 where the image has none, and their embeddings.

    Embeddings that are on the device already are None here. `captions` are what was drawn of another store.
    """

    rows_T: torch.Tensor
    embedding_TD: torch.Tensor | None
    pair_row_G: torch.Tensor | None
    pair_GD: torch.Tensor | None
    captions: DrawnTexts | None = None

    def pin_memory(self) -> DrawnTexts:
        """The same in page-locked memory, see Batch in training/image_batches.py."""
        found = {name: value.pin_memory() for name, value in vars(self).items() if value is not None}
        return replace(self, **found)


class TextBank:
    """Draws `total` texts per step from a text store, and `captions` from theirs by a bank of their own.

    `kept_in` says where all embeddings are: on the "device", or in "memory", if they take a quarter of it at most; else
    on "disk", from where the processes that read images read them too. It is decided here, before those processes are
    forked; `upload` must be called once the device is in use.
    """

    def __init__(
        self,
        store: Store,
        mix: TextMix,
        pairs: Pairs | None,
        selection: SelectedTexts | None = None,
        *,
        seed: int,
        total: int,
        paired: bool = False,
        any_of_its: bool = False,
        captions: TextBank | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`paired` asks for each image's own sentence too: the best of `pairs`, or with `any_of_its` one that is drawn
        anew in each step. `total` counts the texts of the mix with `captions`, and may be 0 where nothing else is
        needed. Raises TrainingError for a mix that cannot be drawn."""
        require_sources(mix, pairs, selection, captions, paired=paired)
        self._store, self._mix, self._pairs, self._paired = store, mix, pairs, paired
        self._seed, self._counts = seed, mix.counts(total)[:3]
        self._any_of_its, self.captions = any_of_its, captions
        self._good = np.flatnonzero(store.status() == Status.OK).astype(np.int32) if mix.random else _NO_ROWS
        self._selected = _selected_rows(pairs, selection) if mix.selected else _NO_ROWS
        self.draws = paired or any(self._counts)
        self.kept_in = place_of(store, device) if self.draws else "disk"
        self._in_memory = store.read(0, store.schema.rows) if self.kept_in == "memory" else None
        self._on_device: torch.Tensor | None = None
        self._process = os.getpid()

    def upload(self, device: torch.device) -> None:
        """Put all embeddings on the device, if that is where they are kept."""
        if self.captions:
            self.captions.upload(device)
        if self.kept_in != "device":
            return
        rows, dim, dtype = self._store.schema.rows, self._store.schema.dim, self._store.schema.dtype
        self._on_device = torch.empty((rows, dim), dtype=getattr(torch, dtype), device=device)
        for at in range(0, rows, _BLOCK):
            self._on_device[at : at + _BLOCK] = torch.from_numpy(self._store.read(at, min(at + _BLOCK, rows)))

    def bytes_of_step(self, batch_size: int) -> int:
        """Bytes of embeddings that are handed over with each batch of `batch_size` images, those of all processes."""
        captions = self.captions.bytes_of_step(batch_size) if self.captions else 0
        texts = sum(self._counts) + (batch_size if self._paired else 0)
        return captions + bytes_of_texts(self._store, self.kept_in, texts)

    def draw(self, step: int, rows_G: _Rows) -> DrawnTexts:
        """The texts of `step`: a function of the seed, the step and the image rows of the global batch alone. Raises
        TrainingError where no sentence was retrieved for any image of the batch, and the mix wants some."""
        if self._process != os.getpid():  # in a forked process: connections cannot be shared
            self._store, self._process = opened(self._store), os.getpid()
            self._pairs = Pairs(self._pairs.path, cached=True) if self._pairs else None
        rows_T = self.rows(step, rows_G)
        pair_row_G = self._own_sentences(self._pairs, step, rows_G) if self._paired and self._pairs else None
        return DrawnTexts(
            rows_T=torch.from_numpy(rows_T),
            embedding_TD=self._read(rows_T),
            pair_row_G=None if pair_row_G is None else torch.from_numpy(pair_row_G),
            pair_GD=None if pair_row_G is None else self._read(np.maximum(pair_row_G, 0)),
            captions=self.captions.draw(step, rows_G) if self.captions else None,
        )

    def _own_sentences(self, pairs: Pairs, step: int, rows_G: _Rows) -> _Rows:
        """The row of each image's own sentence, int64 (G,), -1 where it has none."""
        row_GK: _Rows = pairs.gather(rows_G).astype(np.int64)
        if not self._any_of_its:
            return row_GK[:, 0]
        count_G, rng = (row_GK >= 0).sum(axis=1), np.random.default_rng((self._seed, 0xCA97, step))
        place_G = (rng.random(len(rows_G)) * count_G).astype(np.int64)  # below the count, since those are below 1
        own_G: _Rows = row_GK[np.arange(len(rows_G)), place_G]
        return own_G

    def embeddings(self, drawn: DrawnTexts, send: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The embeddings of drawn texts, float32 (T, D), and after them those of captions, on the device that `send`
        takes tensors to."""
        read_TD = drawn.embedding_TD
        text_TD = self._look_up(send(drawn.rows_T)) if read_TD is None else send(read_TD).float()
        if self.captions and drawn.captions:
            return torch.cat([text_TD, self.captions.embeddings(drawn.captions, send)])
        return text_TD

    def pair(
        self, drawn: DrawnTexts, send: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Each image's own sentence, if they were asked for: embedding float32 (G, D) and row (G,), on the device."""
        if self.captions and drawn.captions and drawn.captions.pair_row_G is not None:
            return self.captions.pair(drawn.captions, send)
        if drawn.pair_row_G is None:
            return None
        row_G, read_GD = send(drawn.pair_row_G), drawn.pair_GD
        embedding_GD = self._look_up(row_G.clamp(min=0)) if read_GD is None else send(read_GD).float()
        return embedding_GD, row_G

    def rows(self, step: int, rows_G: _Rows) -> _Rows:
        """The rows of the text store that are drawn for `step`, int64 (T,)."""
        rng = np.random.default_rng((self._seed, 0xCA98 if self._any_of_its else 0x7E87, step))
        random, selected, retrieved = self._counts
        parts: list[_Rows] = [np.empty(0, np.int64)]
        for count, rows in ((random, self._good), (selected, self._selected)):
            if count and len(rows):
                parts.append(rows[rng.integers(len(rows), size=count)])
        if retrieved and self._pairs is not None:
            found = self._pairs.gather(rows_G)
            found = found[found >= 0]
            if not len(found):
                none = "no image of the batch has a caption" if self._any_of_its else _NONE_RETRIEVED
                what = f"step {step + 1}: {none}"
                raise TrainingError(what, remedy="give a larger --batch-size, or another --text-mix")
            parts.append(rng.choice(found, size=retrieved))
        return np.concatenate(parts).astype(np.int64)

    def _read(self, rows_N: _Rows) -> torch.Tensor | None:
        """Embeddings of rows as stored (N, D), from memory or disk; None if they are kept on the device."""
        if self.kept_in == "device":
            return None
        return torch.from_numpy(self._store.gather(rows_N) if self._in_memory is None else self._in_memory[rows_N])

    def _look_up(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Embeddings of rows, float32 (N, D), from those that are kept on the device."""
        assert self._on_device is not None, "upload was not called"
        return self._on_device[rows_N].float()


def place_of(store: Store, device: torch.device) -> Literal["device", "memory", "disk"]:
    """Where the embeddings of a text store are kept during a run."""
    size = store.schema.rows * store.schema.dim * store.schema.item_bytes
    if size <= _room_on(device):
        return "device"
    return "memory" if size <= _room_in_memory() else "disk"


def bytes_of_texts(store: Store, kept_in: str, texts: int) -> int:
    """Bytes of the embeddings of `texts` sentences that are handed over with a batch of images."""
    return 0 if kept_in == "device" else texts * store.schema.dim * store.schema.item_bytes


def _selected_rows(pairs: Pairs | None, selection: SelectedTexts | None) -> _Rows:
    """The rows of the selection; without one, of all sentences that were retrieved for some image."""
    rows = _NO_ROWS
    if selection is not None:
        rows = selection.rows()
    elif pairs is not None:
        rows = np.flatnonzero(pairs.hits()).astype(np.int32)
    if not len(rows):
        raise TrainingError("no sentence is selected", remedy="select others, or change --text-mix")
    return rows


def _room_on(device: torch.device) -> int:
    """Bytes that sentences may take on a GPU; 0 on the CPU. The GPU's size is asked for, and not its free memory: that
    would begin a context on it, before the processes that read are forked."""
    return torch.cuda.get_device_properties(device).total_memory // _SHARE if device.type == "cuda" else 0


def _room_in_memory() -> int:
    """Bytes that the sentences of each training process may take in this machine's memory."""
    return available_memory() // processes_here() // _SHARE
