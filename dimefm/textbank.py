"""The text batch of a step: teacher embeddings of sentences, drawn apart from the images.

Shapes: T texts, D width, B images, K sentences retrieved for an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from cache_schemas import Status
from dimefm.errors import TrainingError
from dimefm.pairs import Pairs
from dimefm.selected import SelectedTexts
from dimefm.store import Store

RESIDENT_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True)
class TextMix:
    """Shares of a text batch: any sentence, a visually grounded one (of the selection, or retrieved by some image), one
    that was retrieved for an image of the same batch. They add up to 1."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset()

    random: float = 1.0
    selected: float = 0.0
    retrieved: float = 0.0

    def counts(self, total: int) -> tuple[int, int, int]:
        """How many of `total` texts come from each; the random ones take up what rounding leaves."""
        selected, retrieved = round(self.selected * total), round(self.retrieved * total)
        return total - selected - retrieved, selected, retrieved


class TextBank:
    """Draws text batches. The embeddings are held in memory up to 4 GiB, beyond that read from the store's maps."""

    def __init__(
        self,
        store: Store,
        mix: TextMix,
        pairs: Pairs | None,
        selection: SelectedTexts | None = None,
        *,
        seed: int,
    ) -> None:
        shares = (mix.random, mix.selected, mix.retrieved)
        if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise TrainingError(f"the text mix {mix} does not add up to 1", remedy="give shares from 0 to 1")
        if mix.retrieved and pairs is None:
            raise TrainingError("retrieved texts need --pairs", remedy="run dimefm retrieve first")
        if mix.selected and pairs is None and selection is None:
            remedy = "run dimefm retrieve first, and select-texts for a selection"
            raise TrainingError("selected texts need --selection or --pairs", remedy=remedy)
        self._store, self._mix, self._pairs, self._seed = store, mix, pairs, seed
        self._valid = np.flatnonzero(store.status() == Status.OK).astype(np.int32)
        self._selected: np.ndarray[Any, Any] | None = None
        if mix.selected and selection is not None:
            self._selected = selection.rows()
        elif mix.selected and pairs is not None:
            self._selected = np.flatnonzero(pairs.hits()).astype(np.int32)
        size = store.schema.rows * store.schema.dim * 2
        self._resident = store.read(0, store.schema.rows) if size <= RESIDENT_BYTES else None

    def sample(self, step: int, total: int, rows_B: np.ndarray[Any, Any]) -> torch.Tensor:
        """`total` embeddings for `step`, float32 (T, D); a function of seed, step and the batch's image rows alone."""
        rows_T = self.rows(step, total, rows_B)
        vectors = self._store.gather(rows_T) if self._resident is None else self._resident[rows_T]
        return torch.from_numpy(vectors).float()

    def rows(self, step: int, total: int, rows_B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The rows of the text store behind `sample`, int (T,)."""
        rng = np.random.default_rng((self._seed, 0x7E87, step))
        random, selected, retrieved = self._mix.counts(total)
        parts = [self._valid[rng.integers(len(self._valid), size=random)]]
        if selected and self._selected is not None:
            parts.append(self._selected[rng.integers(len(self._selected), size=selected)])
        if retrieved and self._pairs is not None:
            found = self._pairs.gather(rows_B)
            parts.append(rng.choice(found[found >= 0], size=retrieved))
        return np.concatenate(parts)
