"""The two towers of an ONNX export in onnxruntime, on NumPy arrays: what a product would run. It does not need torch.

Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX
from dimefm.errors import TeacherError
from dimefm.models.exported import NEEDS, read_export, require_packages
from dimefm.models.file_tokenizer import FileTokenizer


class OnnxTowers:
    """An ONNX export on the CPU. Each tower is loaded when it is first used; embeddings are float32 of unit norm."""

    def __init__(self, folder: str, threads: int | None = None) -> None:
        """`threads` compute one batch; None: as many as onnxruntime chooses, which is one per core."""
        require_packages(NEEDS["onnx"], f"the ONNX model {folder}")
        self.folder, self.export, self._threads = folder, read_export(folder), threads

    @cached_property
    def tokenize(self) -> FileTokenizer:
        """Sentences to int64 (B, L)."""
        return FileTokenizer(self.folder, self.export.model.context_length)

    def encode_images(self, pixels_B3HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """uint8 (B, 3, H, W), resized and cropped but not normalised, to float32 (B, D)."""
        assert self.export.onnx is not None
        if self.export.onnx.image_input == "float32":
            facts = self.export.model.preprocessing
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (facts.mean, facts.std))
            pixels_B3HW = (pixels_B3HW.astype(np.float32) / 255 - mean) / std
        return self._run(self._image, pixels_B3HW)

    def encode_tokens(self, tokens_BL: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int64 (B, L) to float32 (B, D)."""
        return self._run(self._text, tokens_BL)

    def encode_texts(self, texts: list[str]) -> np.ndarray[Any, Any]:
        """Sentences to float32 (B, D)."""
        return self.encode_tokens(self.tokenize(texts))

    @cached_property
    def _image(self) -> Any:
        return self._open(IMAGE_ONNX)

    @cached_property
    def _text(self) -> Any:
        return self._open(TEXT_ONNX)

    def _open(self, file: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = Path(self.folder, file)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises kinds of its own for each fault
            reason = str(error).strip().splitlines()[0]
            raise TeacherError(f"{path} cannot be loaded: {reason}", remedy="export the model again") from error

    def _run(self, session: Any, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: values})[0]
        return found
