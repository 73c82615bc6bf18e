"""A file of predictions, read back for a look at what is right and wrong: never all of its scores at once.

Shapes: N images, B of a block, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dimefm.errors import StoreError

_ROWS, _BUFFER = 2048, 1 << 20  # rows that are decoded at a time, and bytes that are read at a time
_COLUMNS = ["key", "label", "prediction", "correct", "scores"]


@dataclass(frozen=True)
class Predicted:
    """What a model takes each image of a set for. Where an image may have several labels, `labels` is bool (N, C), else
    int64 (N,); `prediction_N` is -1 where the image could not be read. `score_N` is that of the predicted class and
    `own_N` that of the label, the best one where there are several: both 0 where there is none."""

    classes: list[str]
    keys: pa.ChunkedArray
    labels: np.ndarray[Any, Any]
    prediction_N: np.ndarray[Any, Any]
    correct_N: np.ndarray[Any, Any]
    score_N: np.ndarray[Any, Any]
    own_N: np.ndarray[Any, Any]

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return bool(self.labels.ndim == 2)

    def has_class(self, label: int) -> np.ndarray[Any, Any]:
        """Which images are of a class, bool (N,)."""
        found: np.ndarray[Any, Any] = self.labels[:, label] if self.multilabel else self.labels == label
        return found

    def label_names(self, row: int) -> str:
        """The class of an image, or its classes."""
        labels = np.flatnonzero(self.labels[row]) if self.multilabel else [self.labels[row]]
        return ", ".join(self.classes[label] for label in labels) or "no class"

    def same_images(self, other: Predicted) -> bool:
        """Whether both are of the same images, labels and classes, in the same order."""
        alike = self.classes == other.classes and self.keys.equals(other.keys)
        return alike and np.array_equal(self.labels, other.labels)


def read_predicted(path: str) -> Predicted:
    """The predictions in a file that write_predictions has written. Raises StoreError for a damaged one."""
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            width = file.schema_arrow.field("scores").type.list_size
            blocks = [_block(one, width) for one in file.iter_batches(_ROWS, columns=_COLUMNS, use_threads=False)]
            said = (file.schema_arrow.metadata or {}).get(b"classes", b"").decode()
    except (OSError, KeyError, AttributeError, ValueError, pa.ArrowException) as error:
        remedy = "delete it, and evaluate the set again with --predictions"
        raise StoreError(f"{path} holds no predictions that can be read: {error}", remedy=remedy) from None
    classes = said.split("\n")
    if len(classes) != width:  # a name with a line end in it
        classes = [f"class {number}" for number in range(width)]
    keys = pa.chunked_array([block[0] for block in blocks], pa.string())
    arrays = [np.concatenate(parts) for parts in list(zip(*blocks, strict=True))[1:]]
    if not arrays:
        raise StoreError(f"{path} has no image", remedy="evaluate the set again with --predictions")
    return Predicted(classes, keys, *arrays)


def _block(batch: pa.RecordBatch, width: int) -> tuple[Any, ...]:
    """The keys and the arrays of some images. Raises ValueError for labels and predictions that are no class."""
    scores_BC = batch["scores"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), width)
    prediction_B = batch["prediction"].to_numpy(zero_copy_only=False)
    label, rows_B = batch["label"], np.arange(len(batch))
    if pa.types.is_list(label.type):
        labels = np.zeros((len(batch), width), bool)
        flat = label.flatten().to_numpy(zero_copy_only=False)
        _require_classes(flat, 0, width)
        labels[np.repeat(rows_B, label.value_lengths().to_numpy(zero_copy_only=False)), flat] = True
        own_B = np.where(labels, scores_BC, 0).max(axis=1)
    else:
        labels = label.to_numpy(zero_copy_only=False)
        _require_classes(labels, 0, width)
        own_B = scores_BC[rows_B, labels]
    _require_classes(prediction_B, -1, width)
    score_B = np.where(prediction_B >= 0, scores_BC[rows_B, prediction_B], 0)
    correct_B = batch["correct"].to_numpy(zero_copy_only=False)
    return batch["key"], labels, prediction_B, correct_B, score_B, own_B


def _require_classes(numbers: np.ndarray[Any, Any], least: int, classes: int) -> None:
    if len(numbers) and not (numbers.dtype.kind == "i" and numbers.min() >= least and numbers.max() < classes):
        raise ValueError(f"a label or a prediction is none of {classes} classes")
