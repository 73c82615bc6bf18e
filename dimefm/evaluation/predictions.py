"""The prediction for every image, for error analysis and for submissions; a summary of the classes that are confused.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Failure
from cache_schemas.evaluation import PREDICTIONS, EvaluationResult
from dimefm.datasets.image_set import ImageSet
from dimefm.store.parquet_tables import write_table
from dimefm.system import storage
from dimefm.system.inert_text import markdown
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import counted

_SHOWN = 20  # rows of a table, and failures
PREDICTIONS_SUFFIX, SUMMARY_SUFFIX = ".parquet", ".md"


def file_name(title: str, protocol: str) -> str:
    """The name, without a suffix, of the files of a set's predictions under a protocol."""
    return f"{title}.{protocol.replace('/', '.').replace(', ', '-')}"


def read_scores(path: str) -> np.ndarray[Any, Any]:
    """The scores float32 (N, C) in a file of predictions."""
    column = pq.read_table(path, columns=["scores"], use_threads=False)["scores"].combine_chunks()
    flat: np.ndarray[Any, Any] = column.flatten().to_numpy()
    return flat.reshape(len(column), -1)


def read_predictions(folder: str, result: EvaluationResult) -> list[int]:
    """The predicted class of every image, -1 where it could not be read, for a result in `folder`."""
    path = Path(folder, PREDICTIONS, file_name(result.title, result.protocol) + PREDICTIONS_SUFFIX)
    found: list[int] = pq.read_table(path, columns=["prediction"], use_threads=False)["prediction"].to_pylist()
    return found


def read_keys(path: str) -> list[str]:
    """The keys of the images in a file of predictions, in the order of the file."""
    keys: list[str] = pq.read_table(path, columns=["key"], use_threads=False)["key"].to_pylist()
    return keys


def write_predictions(
    path: str, scores_NC: np.ndarray[Any, Any], images: ImageSet, failures: Sequence[Failure]
) -> None:
    """Write PATH.parquet and PATH.md.

    PATH.parquet has key, file, label, prediction, correct and scores of every image, in the order of the set. PATH.md
    lists the classes that are recognised least, and which class is most often mistaken for which.
    """
    labels, readable = images.class_labels, ~np.isnan(scores_NC).all(axis=1)
    filled_NC = np.nan_to_num(scores_NC).astype(np.float32)
    prediction_N = np.where(readable, filled_NC.argmax(axis=1), -1)
    multilabel = labels.ndim == 2
    correct_N = labels[np.arange(len(labels)), prediction_N] & readable if multilabel else labels == prediction_N
    columns = {
        "key": pa.array([sample.key for sample in images.samples]),
        "file": pa.array([sample.file for sample in images.samples]),
        "label": pa.array([np.flatnonzero(row).tolist() for row in labels] if multilabel else labels),
        "prediction": pa.array(prediction_N),
        "correct": pa.array(correct_N),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(filled_NC.reshape(-1)), filled_NC.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({"classes": "\n".join(images.classnames)})
    write_table(path + PREDICTIONS_SUFFIX, table)
    storage.write_atomic(path + SUMMARY_SUFFIX, _summary(images, prediction_N, correct_N, failures).encode())


def _summary(
    images: ImageSet,
    prediction_N: np.ndarray[Any, Any],
    correct_N: np.ndarray[Any, Any],
    failures: Sequence[Failure],
) -> str:
    from dimefm.evaluation.metrics import confusion  # imports torch: predictions are read without it

    lines = [f"# {markdown(images.name)}: what is taken for what", ""]
    lines += [
        f"{counted(len(images.samples), 'image')}, {correct_N.mean():.1%} right, {len(failures)} could not be read.",
        "",
    ]
    lines += [f"- {markdown(failure.key)}: {markdown(failure.reason)}" for failure in failures[:_SHOWN]]
    if images.class_labels.ndim == 2:
        several = "An image may have several labels here: it counts as right if the class with the best score is one."
        return "\n".join([*lines, several, ""])
    names = [markdown(name) for name in images.classnames]
    confused_CC = confusion(images.class_labels, prediction_N, len(names))
    total_C = np.bincount(images.class_labels, minlength=len(names))
    lines += ["", *_least_recognised(names, confused_CC, total_C), "", *_most_confused(names, confused_CC), ""]
    return "\n".join(lines)


def _least_recognised(names: list[str], confused_CC: np.ndarray[Any, Any], total_C: np.ndarray[Any, Any]) -> list[str]:
    """A table of the classes with the smallest share of right answers."""
    right_C = np.diag(confused_CC) / np.maximum(total_C, 1)
    worst = [c for c in np.argsort(right_C, kind="stable").tolist() if total_C[c]][:_SHOWN]
    rows = [("recognised least", "images", "right", "mostly taken for")]
    for c in worst:
        others = confused_CC[c].copy()
        others[c] = 0
        taken = f"{names[others.argmax()]} ({others.max()})" if others.max() else ""
        rows.append((names[c], str(total_C[c]), f"{right_C[c]:.0%}", taken))
    return markdown_table(rows, align="lrrl")


def _most_confused(names: list[str], confused_CC: np.ndarray[Any, Any]) -> list[str]:
    """A table of the pairs of classes of which one is most often mistaken for the other."""
    wrong_CC = confused_CC - np.diag(np.diag(confused_CC))
    pairs = np.argsort(-wrong_CC, axis=None, kind="stable")[:_SHOWN]
    rows = [("is", "taken for", "times")]
    for label, prediction in zip(*np.unravel_index(pairs, wrong_CC.shape), strict=True):
        if wrong_CC[label, prediction]:
            rows.append((names[label], names[prediction], str(wrong_CC[label, prediction])))
    return markdown_table(rows, align="llr")
