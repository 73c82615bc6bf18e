"""The tokenizer in the folder of an exported model. It does not need torch.

Shapes: B sentences, L tokens of the context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas.export import TOKENIZER_FILE
from dimefm.errors import TeacherError


class FileTokenizer:
    """The tokenizer in the folder of an exported model. Safe in threads."""

    def __init__(self, folder: str, context_length: int) -> None:
        from tokenizers import Tokenizer

        path = Path(folder, TOKENIZER_FILE)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # a library in Rust raises Exception itself
            raise TeacherError(f"{path} cannot be read: {error}", remedy="export the model again") from error
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        """int64 (B, L); tokens beyond the context length are cut off, and shorter sentences padded."""
        if not texts:
            return np.zeros((0, self.context_length), np.int64)
        return np.array([one.ids for one in self._tokenizer.encode_batch(texts)], np.int64)
