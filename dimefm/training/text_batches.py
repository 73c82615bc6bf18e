"""Batches for a student's text tower: tokens beside the cached teacher embeddings of their sentences.

Shapes: B sentences of this process, N sentences of a window, L tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from cache_schemas import SchemaError
from cache_schemas.run import TextSpec
from dimefm.errors import DimefmError, TrainingError
from dimefm.models.towers import tokenizer_of
from dimefm.store.embedding_store import Store, opened
from dimefm.training.batch_loader import Request, training_error


@dataclass(frozen=True)
class TextBatch:
    """One step's sentences: tokens int64 (B, L), teacher embeddings as stored (B, D)."""

    tokens_BL: torch.Tensor
    teacher_BD: torch.Tensor

    def pin_memory(self) -> TextBatch:
        """The same in page-locked memory, see Batch in training/image_batches.py."""
        return TextBatch(self.tokens_BL.pin_memory(), self.teacher_BD.pin_memory())


class TrainingTexts(Dataset["TextBatch | TrainingError"]):
    """Indexed by Request: tokenises the sentences of a batch and gathers their embeddings.

    The first request of a window reads all sentences of the window from the plans. So requests must come in order, and
    to one process.
    """

    def __init__(self, store: Store | str, spec: TextSpec) -> None:
        self._given, self._spec = store, spec
        self._opened: tuple[Store, Any] | None = None  # by the process that reads, at its first request
        self._rows_N, self._texts = np.empty(0, np.int64), pa.array([], pa.string())  # of the window that was read last

    def __getitem__(self, request: Request) -> TextBatch | TrainingError:
        try:
            if self._opened is None:
                self._opened = opened(self._given), tokenizer_of(self._spec)
            store, tokenizer = self._opened
            if request.window_N is not None:
                self._rows_N = np.sort(request.window_N)
                self._texts = store.entries(self._rows_N, ("text",))["text"]
            texts = self._texts.take(np.searchsorted(self._rows_N, request.rows_B)).to_pylist()
            return TextBatch(tokens_BL=tokenizer(texts), teacher_BD=torch.from_numpy(store.gather(request.rows_B)))
        except (DimefmError, SchemaError, OSError) as error:
            return training_error(error)
