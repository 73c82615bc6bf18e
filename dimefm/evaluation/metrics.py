"""The metrics of evaluation: functions of arrays, which read and write no files. Their intervals are in intervals.py.

Shapes: N images, C classes, M texts, D width, R resamples, Q queries, S candidates, K best of them, G groups of images
with equal scores. A higher score means more likely. An image that could not be read has NaN for all its scores; it
stays in every metric, as a wrong answer or with the lowest scores of all. Values are in [0, 1].

Every function raises ValueError for arrays that are empty or of different lengths, and for an image with NaN for only
some of its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logit

Array = np.ndarray[Any, Any]
_Ranking = tuple[Array, Array, Array]

RECALLS_11 = np.linspace(1, 0, 11)  # in the order and with the rounding of vision_evaluation
_QUERIES = 1024  # with 31,000 candidates, 128 MB of scores


def count_images(*arrays: Array) -> int:
    """The length that all arrays have. Raises ValueError if they differ, or are empty."""
    lengths = {len(array) for array in arrays}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"arrays of one length, and not empty, are needed, not of {sorted(lengths)}")
    return lengths.pop()


def _unreadable(scores: Array) -> Array:
    """Which images have no score, bool (N,), from scores (N,) or (N, C)."""
    nan: Array = np.isnan(scores)
    if nan.ndim == 1:
        return nan
    none_N = np.asarray(nan.all(axis=1))
    if partly := int((nan.any(axis=1) & ~none_N).sum()):
        raise ValueError(f"{partly} images have NaN for some of their scores only")
    return none_N


def lowest_if_unreadable(scores: Array) -> Array:
    """The scores as float64, with -inf for unreadable images."""
    scores = np.array(scores, np.float64)
    scores[_unreadable(scores)] = -np.inf
    return scores


def _float32(values: Array) -> torch.Tensor:
    """A copy as a tensor: torch warns about an array that cannot be written to."""
    return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32)


def topk_correct(scores_NC: Array, labels_N: Array, k: int, among: int = 1) -> Array:
    """Whether the label is one of the `k` classes with the largest scores, bool (N,). All count if there are fewer.

    Ties: for k = 1 the first class wins (argmax); for k > 1 as torch.topk in float32. With `among`, the first k of that
    many count: CLIP_benchmark takes as top-1 the first of the five best, which is not always argmax if two classes have
    the same name. Raises ValueError if k is not positive or a label is no class.
    """
    count_images(scores_NC, labels_N)
    classes = scores_NC.shape[1]
    if k < 1:
        raise ValueError(f"the k best of {classes} classes: k is {k}")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise ValueError(f"labels {labels_N.min()} to {labels_N.max()} for {classes} classes")
    if max(k, among) == 1:
        best_NK = scores_NC.argmax(axis=1)[:, None]
    else:
        best_NK = _float32(scores_NC).topk(min(max(k, among), classes), dim=1).indices.numpy()[:, :k]
    correct_N: Array = (best_NK == labels_N[:, None]).any(axis=1) & ~_unreadable(scores_NC)
    return correct_N


def mean_per_class(correct_N: Array, labels_N: Array, weights: Array | None = None) -> float:
    """The share of correct images per class, as a mean over the classes that occur: scikit-learn's balanced accuracy.
    An image counts `weights` times (N,), or once."""
    weight_N = np.ones(count_images(correct_N, labels_N)) if weights is None else weights
    count_C = np.bincount(labels_N, weight_N)
    correct_C = np.bincount(labels_N, weight_N * correct_N)
    return float((correct_C[count_C > 0] / count_C[count_C > 0]).mean())


def require_two_classes(labels_N: Array) -> None:
    found = np.unique(labels_N).tolist()
    if found != [0, 1]:
        raise ValueError(f"the area under the ROC curve needs images of both class 0 and class 1, not of {found}")


def roc_auc(scores_N: Array, labels_N: Array) -> float:
    """The area under the ROC curve: the probability that an image with label 1 has a higher score than one with label
    0, with equal scores counted as half. `scores_N` are those of class 1. Raises ValueError if only one class
    occurs."""
    from sklearn.metrics import roc_auc_score  # takes a second

    count_images(scores_N, labels_N)
    require_two_classes(labels_N)
    ranks_N = np.unique(lowest_if_unreadable(scores_N), return_inverse=True)[1]  # scikit-learn takes no infinities
    return float(roc_auc_score(labels_N, ranks_N))


def rank(scores_N: Array, positive_N: Array) -> _Ranking:
    """The images from the highest score down int64 (N,), which of these are positive bool (N,), and where in this order
    groups of equal scores end int64 (G,). Groups without a positive are left out: precision is largest where recall
    rises."""
    order_N = np.argsort(-scores_N, kind="stable")
    sorted_N, hits_N = scores_N[order_N], positive_N[order_N]
    ends_G = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    return order_N, hits_N, ends_G[np.diff(np.cumsum(hits_N)[ends_G], prepend=0) > 0]


def average_precisions(weights_RN: Array, ranking: _Ranking) -> Array:
    """The 11-point average precision (R,) of a class, with images counted `weights_RN` times; NaN without a
    positive."""
    order_N, hits_N, ends_G = ranking
    sorted_RN = weights_RN[:, order_N]
    seen_RG = sorted_RN.cumsum(axis=1, dtype=weights_RN.dtype)[:, ends_G]
    true_RG = sorted_RN[:, hits_N].cumsum(axis=1)[:, np.cumsum(hits_N)[ends_G] - 1]
    precision_RG = true_RG / np.maximum(seen_RG, 1)
    best_RG = np.maximum.accumulate(precision_RG[:, ::-1], axis=1)[:, ::-1]
    positives_R = true_RG[:, -1]
    recall_RG = true_RG / np.maximum(positives_R, 1)[:, None]
    rows_R = np.arange(len(weights_RN))
    interpolated = [best_RG[rows_R, (recall_RG >= recall).argmax(axis=1)] for recall in RECALLS_11[:-1]]
    means_R = (sum(interpolated) + 1.0) / len(RECALLS_11)  # at recall 0, precision 1
    return np.where(positives_R > 0, means_R, np.nan)


def average_precision_11_point(scores_N: Array, positive_N: Array) -> float:
    """The largest precision at a recall of at least r, as a mean over the recalls r = 0, 0.1, ... 1.

    This is the metric of vision_evaluation 0.2.14 (MeanAveragePrecisionNPointsEvaluator), from which the published
    ELEVATER numbers come. Its curve begins at recall 0 with precision 1, so the first of the eleven is always 1, and
    images with equal scores enter together. In the devkit of VOC2007 the curve begins at the first image, and equal
    scores have an order. Raises ValueError if no image is positive.
    """
    images = count_images(scores_N, positive_N)
    if not positive_N.any():
        raise ValueError(f"average precision needs a positive; none of {images} images is one")
    ranking = rank(lowest_if_unreadable(scores_N), positive_N.astype(bool))
    return float(average_precisions(np.ones((1, images), np.int64), ranking)[0])


def map_11_point(scores_NC: Array, positives_NC: Array) -> float:
    """The mean of `average_precision_11_point` over the classes with a positive; 0 if there is none, as in
    vision_evaluation."""
    count_images(scores_NC, positives_NC)
    scores_NC = lowest_if_unreadable(scores_NC)
    classes = np.flatnonzero(positives_NC.any(axis=0))
    each = [average_precision_11_point(scores_NC[:, c], positives_NC[:, c]) for c in classes]
    return float(np.mean(each)) if each else 0.0


def retrieval_recall(images_ND: Array, texts_MD: Array, image_of_text_M: Array, ks: Sequence[int]) -> dict[str, Array]:
    """For each k of `ks`, the hits in both directions; their means are the recalls. Names are those of CLIP_benchmark.

    ``text_retrieval_recall@k`` is bool (N,): is a text of the image one of the k nearest texts?
    ``image_retrieval_recall@k`` is bool (M,): is the image of the text one of the k nearest images? Embeddings have
    unit norm and are compared in float32. An image that could not be read (NaN) is never the nearest, and is a miss in
    both directions. Ties are as in torch.topk. A k above the number of candidates takes all. Raises ValueError if an
    image has no text, a text is NaN or belongs to no image, or a k is not positive.
    """
    count_images(texts_MD, image_of_text_M)
    images = count_images(images_ND)
    if min(ks) < 1:
        raise ValueError(f"the k nearest: k is {min(ks)}")
    if image_of_text_M.min() < 0 or image_of_text_M.max() >= images:
        raise ValueError(f"texts of images {image_of_text_M.min()} to {image_of_text_M.max()}, but there are {images}")
    if without := images - len(np.unique(image_of_text_M)):
        raise ValueError(f"{without} of {images} images have no text")
    if np.isnan(texts_MD).any():
        raise ValueError("the embedding of a text is NaN")
    image_ND, text_MD = _float32(images_ND), _float32(texts_MD)
    image_N, image_M = torch.arange(images), torch.tensor(image_of_text_M, dtype=torch.int64)
    lost_N = image_ND.isnan().any(dim=1)
    to_texts = _hits(image_ND, image_N, text_MD, image_M, lost_N, ks)
    to_images = _hits(text_MD, image_M, image_ND, image_N, lost_N, ks)
    found = {f"text_retrieval_recall@{k}": hits for k, hits in zip(ks, to_texts, strict=True)}
    return found | {f"image_retrieval_recall@{k}": hits for k, hits in zip(ks, to_images, strict=True)}


def _hits(
    queries_QD: torch.Tensor,
    image_Q: torch.Tensor,
    candidates_SD: torch.Tensor,
    image_S: torch.Tensor,
    lost_N: torch.Tensor,
    ks: Sequence[int],
) -> list[Array]:
    """For each k, whether one of the k nearest candidates has the query's image, bool (Q,)."""
    hits_KQ = torch.zeros((len(ks), len(queries_QD)), dtype=torch.bool)
    for start in range(0, len(queries_QD), _QUERIES):
        block = slice(start, start + _QUERIES)
        scores_QS = (queries_QD[block] @ candidates_SD.T).nan_to_num_(nan=-torch.inf)
        for row, k in enumerate(ks):
            nearest_QK = scores_QS.topk(min(k, len(candidates_SD)), dim=1).indices
            hits_KQ[row, block] = (image_S[nearest_QK] == image_Q[block, None]).any(dim=1)
    return list((hits_KQ & ~lost_N[image_Q]).numpy())


def effective_robustness(accuracy: float, imagenet_accuracy: float, slope: float, intercept: float) -> float:
    """The accuracy under a shift, minus what is expected of a model with this ImageNet accuracy, in [-1, 1]. The line
    of Taori et al. (2020) is fitted to logits of accuracies; an ImageNet accuracy of 0 or 1 is moved by 1e-6."""
    inside = np.clip(imagenet_accuracy, 1e-6, 1 - 1e-6)
    return float(accuracy - expit(slope * logit(inside) + intercept))


def confusion(labels_N: Array, predictions_N: Array, classes: int) -> Array:
    """The number of images by label and prediction, int64 (C, C), without images that could not be read, whose
    prediction is -1. Raises ValueError for any other label or prediction that is no class."""
    count_images(labels_N, predictions_N)
    both = np.stack([labels_N, predictions_N])[:, predictions_N != -1]
    if ((both < 0) | (both >= classes)).any() or not ((labels_N >= 0) & (labels_N < classes)).all():
        raise ValueError(f"a label or prediction that is none of {classes} classes")
    return np.bincount(both[0] * classes + both[1], minlength=classes**2).reshape(classes, classes).astype(np.int64)
