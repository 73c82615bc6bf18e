"""From features to the numbers of a set: cosines, metrics and their intervals.

Shapes: N images, B of a block, C classes, M captions, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from cache_schemas.evaluation import Metric
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import SourceError
from dimefm.evaluation import metrics
from dimefm.evaluation.features import Features
from dimefm.evaluation.intervals import (
    Interval,
    map_11_point_interval,
    mean_interval,
    mean_per_class_interval,
    retrieval_intervals,
    roc_auc_interval,
)

KS = (1, 5, 10)
REPORTED: dict[Metric, str] = {
    "accuracy": "top1",
    "mean_per_class": "mean_per_class",
    "roc_auc": "roc_auc",
    "map_11_point": "map_11_point",
    "recall": "mean_recall@1",
}
"""By the metric that a definition asks for, the name that it has in a result."""

_SCALE = 100.0  # of CLIP's logits; it turns cosines into the probabilities that ELEVATER ranks by


@dataclass(frozen=True)
class Measurement:
    """Metrics in [0, 1] and their 95% intervals, by name."""

    values: dict[str, float]
    intervals: dict[str, Interval]


def cosines(features: Features, classes_CD: torch.Tensor) -> np.ndarray[Any, Any]:
    """float32 (N, C); NaN for images that could not be read."""
    blocks = [torch.from_numpy(block_BD) @ classes_CD.T for block_BD in features.blocks()]
    scores_NC: np.ndarray[Any, Any] = torch.cat(blocks).numpy()
    scores_NC[~features.readable] = np.nan
    return scores_NC


def probabilities(cosine_NC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """CLIP's probabilities, float32 (N, C): the softmax of 100 times the cosines."""
    found: np.ndarray[Any, Any] = softmax(_SCALE * cosine_NC, axis=1)
    return found


def measure(scores_NC: np.ndarray[Any, Any], images: ImageSet, metric: Metric) -> Measurement:
    """Every metric that the labels of the set allow. Equal scores are ordered as in CLIP_benchmark. The area under the
    ROC curve and mAP rank the images of a class by `scores_NC` as they are. Raises SourceError if `metric`, the one
    that is reported, is not defined."""
    labels = images.class_labels
    values: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    if labels.ndim == 2:
        if not labels.any():
            raise SourceError(f"{images.where}: no image has a label", remedy="write 1 for each class of an image")
        values["map_11_point"] = metrics.map_11_point(scores_NC, labels)
        intervals["map_11_point"] = map_11_point_interval(scores_NC, labels)
        return Measurement(values, intervals)
    correct_N = metrics.topk_correct(scores_NC, labels, 1)
    hits = {"top1": correct_N}
    if scores_NC.shape[1] >= 5:
        hits["top1"] = metrics.topk_correct(scores_NC, labels, 1, among=5)
    if scores_NC.shape[1] > 5:
        hits["top5"] = metrics.topk_correct(scores_NC, labels, 5)
    for name, hit_N in hits.items():
        values[name], intervals[name] = float(hit_N.mean()), mean_interval(hit_N)
    values["mean_per_class"] = metrics.mean_per_class(correct_N, labels)
    intervals["mean_per_class"] = mean_per_class_interval(correct_N, labels)
    if metric == "roc_auc":
        try:
            values["roc_auc"] = metrics.roc_auc(scores_NC[:, 1], labels)
            intervals["roc_auc"] = roc_auc_interval(scores_NC[:, 1], labels)
        except ValueError as error:
            raise SourceError(f"{images.where}: {error}", remedy="give images of both classes") from None
    return Measurement(values, intervals)


def measure_retrieval(features: Features, texts_MD: torch.Tensor, images: ImageSet) -> Measurement:
    """R@1, R@5 and R@10 from images to captions and back: the share of queries for which one of the k nearest is right.
    Names are those of CLIP_benchmark; ``mean_recall@1`` is the mean of both directions."""
    assert images.captions is not None
    image_ND = features.all()
    image_ND[~features.readable] = np.nan
    image_of_text_M = np.repeat(np.arange(len(images.captions)), [len(texts) for texts in images.captions])
    hits = metrics.retrieval_recall(image_ND, texts_MD.numpy(), image_of_text_M, KS)
    values = {name: float(hit.mean()) for name, hit in hits.items()}
    both = [f"{way}_retrieval_recall@1" for way in ("text", "image")]
    intervals = retrieval_intervals(hits, image_of_text_M, {"mean_recall@1": both})
    return Measurement(values | {"mean_recall@1": float(np.mean([values[name] for name in both]))}, intervals)
