"""The 95% intervals of the metrics (evaluation.metrics); those of a mean of several sets are in suite_means.

They treat images as independent, and the classes, images and texts that are searched as fixed. Shares (accuracies,
their means per class, and recalls) have score intervals (Wilson 1927; Brown, Cai and DasGupta 2001, Statistical
Science 16), which also hold for few images and are not a single point if all are right. For what is not a plain share,
they are the intervals of as many independent images as would have its standard error (Franco et al. 2019, Journal of
Survey Statistics and Methodology 7). The captions of an image tend to be right or wrong together: the standard error of
recalls is that of a bootstrap over images, each with all its captions and in both directions (a cluster bootstrap:
Davison and Hinkley 1997, section 3.8; Field and Welsh 2007, Journal of the Royal Statistical Society B 69).

The area under the ROC curve and mAP have the percentile bootstrap over images (Efron 1981): a resample draws N of the N
images with replacement, and one in which the metric is undefined is left out. With fewer than about 50 images, or if
nearly all are right, it is too narrow.

Shapes: N images, C classes, M texts, R resamples, G groups of images with equal scores, V recalls. Arrays are as the
metrics take them, and the same ones raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from dimefm.evaluation.metrics import (
    Array,
    average_precisions,
    count_images,
    lowest_if_unreadable,
    rank,
    require_two_classes,
)

Interval = tuple[float, float]
TAILS = (0.025, 0.975)
_RESAMPLES = 64  # at a time, with 5,000 images 1.3 MB of counts


def _resamples(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """For each resample, how many times it has each image, int64 (N,)."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, n, n), minlength=n)


def _percentiles(values_R: Array) -> Interval:
    defined = values_R[~np.isnan(values_R)]
    if not len(defined):
        raise ValueError("the metric is undefined in every resample")
    low, high = np.quantile(defined, TAILS)
    return float(low), float(high)


def bootstrap_interval(statistic: Callable[[Array], float], n: int, resamples: int = 1000, seed: int = 0) -> Interval:
    """The 95% interval of any metric of `n` images. `statistic` is the metric of a resample, given how many times it
    has each image, int64 (N,); NaN if it is undefined. Raises ValueError if it is undefined in every resample."""
    return _percentiles(np.array([statistic(counts_N) for counts_N in _resamples(n, resamples, seed)]))


def _score_interval(share: float, variance: float, images: int) -> Interval:
    """Wilson's interval for as many independent images as would give a share this variance; `images` if that is 0."""
    count = share * (1 - share) / variance if variance > 0 else images
    square = ndtri(TAILS[1]) ** 2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = np.sqrt(square * (share * (1 - share) / count + square / (4 * count**2))) / (1 + square / count)
    return float(max(0.0, min(share, middle - half))), float(min(1.0, max(share, middle + half)))


def mean_interval(correct_N: Array) -> Interval:
    """The interval of the mean of bool (N,)."""
    images, share = count_images(correct_N), float(correct_N.mean())
    return _score_interval(share, share * (1 - share) / images, images)


def difference_interval(before_N: Array, after_N: Array) -> Interval:
    """The interval of how much larger the mean of `after_N` is than that of `before_N`, bool (N,) of the same images:
    that of Agresti and Min (2005, Statistics in Medicine 24), which is no single point where both always agree."""
    images = count_images(before_N, after_N) + 2
    gained, lost = ((one_N & ~other_N).sum() + 0.5 for one_N, other_N in ((after_N, before_N), (before_N, after_N)))
    middle = (gained - lost) / images
    half = ndtri(TAILS[1]) * np.sqrt(gained + lost - images * middle**2) / images
    return float(middle - half), float(middle + half)


def mean_per_class_interval(correct_N: Array, labels_N: Array) -> Interval:
    """The interval of `mean_per_class`, from the variance of a mean of independent shares. The variance of a class with
    a single image is taken from all classes, as if they were alike."""
    images = count_images(correct_N, labels_N)
    _, class_N, count_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    share_C = np.bincount(class_N, correct_N) / count_C
    mean = float(share_C.mean())
    variance_C = np.where(count_C > 1, share_C * (1 - share_C) / np.maximum(count_C - 1, 1), mean * (1 - mean))
    return _score_interval(mean, float(variance_C.sum()) / len(count_C) ** 2, images)


def retrieval_intervals(
    hits: Mapping[str, Array],
    image_of_text_M: Array,
    means: Mapping[str, Sequence[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of every recall, from the hits of `retrieval_recall`, and of `means`, each the mean of some of them.

    An image is drawn with all its texts, and for both directions at once, because their hits are not independent.
    """
    texts_N = np.bincount(image_of_text_M)
    images = len(texts_N)
    right: list[Array] = []  # for each recall, how many queries of an image hit
    asked: list[Array] = []  # and how many queries it has
    for name, hit in hits.items():
        by_image = name.startswith("text_")  # texts are retrieved for an image
        count_images(hit, texts_N if by_image else image_of_text_M)
        right.append(hit.astype(np.float64) if by_image else np.bincount(image_of_text_M, hit))
        asked.append(np.ones(images) if by_image else texts_N.astype(np.float64))
    right_NV, asked_NV = np.stack(right, axis=1), np.stack(asked, axis=1)
    resampled = (counts_N.astype(np.float64) for counts_N in _resamples(images, resamples, seed))
    drawn_RV = np.stack([(counts_N @ right_NV) / (counts_N @ asked_NV) for counts_N in resampled])
    drawn = {name: drawn_RV[:, place] for place, name in enumerate(hits)}
    values = {name: float(hit.mean()) for name, hit in hits.items()}
    for name, those in means.items():
        drawn[name] = np.mean([drawn[one] for one in those], axis=0)
        values[name] = float(np.mean([values[one] for one in those]))
    scale = images / max(1, images - 1)
    return {
        name: _score_interval(values[name], float(drawn_R.var()) * scale, images) for name, drawn_R in drawn.items()
    }


def roc_auc_interval(scores_N: Array, labels_N: Array, resamples: int = 1000, seed: int = 0) -> Interval:
    """The interval of `roc_auc`; raises ValueError as it does. A resample with only one class is left out."""
    images = count_images(scores_N, labels_N)
    require_two_classes(labels_N)
    ranks_N = np.unique(lowest_if_unreadable(scores_N), return_inverse=True)[1]
    place_N, size = 2 * ranks_N + labels_N.astype(np.int64), 2 * (int(ranks_N.max()) + 1)

    def area(counts_N: Array) -> float:
        negative_G, positive_G = np.bincount(place_N, counts_N, size).reshape(-1, 2).T
        pairs = negative_G.sum() * positive_G.sum()
        # A positive wins against the negatives of lower groups, and half of those in its own.
        won = (positive_G * (np.cumsum(negative_G) - negative_G / 2)).sum()
        return float(won / pairs) if pairs else np.nan

    return bootstrap_interval(area, images, resamples, seed)


def map_11_point_interval(scores_NC: Array, positives_NC: Array, resamples: int = 1000, seed: int = 0) -> Interval:
    """The interval of `map_11_point`. A class without a positive in a resample is left out of its mean."""
    images = count_images(scores_NC, positives_NC)
    scores_NC, positives_NC = lowest_if_unreadable(scores_NC), positives_NC.astype(bool)
    rankings = [rank(scores_NC[:, c], positives_NC[:, c]) for c in np.flatnonzero(positives_NC.any(axis=0))]
    if not rankings:
        return 0.0, 0.0
    counts, means = _resamples(images, resamples, seed), np.full(resamples, np.nan)
    for start in range(0, resamples, _RESAMPLES):
        size = min(_RESAMPLES, resamples - start)
        counts_RN = np.stack([next(counts) for _ in range(size)]).astype(np.int32)
        each_RC = np.stack([average_precisions(counts_RN, ranking) for ranking in rankings], axis=1)
        defined_RC = ~np.isnan(each_RC)
        sums_R = np.where(defined_RC, each_RC, 0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            means[start : start + size] = sums_R / defined_RC.sum(axis=1)
    return _percentiles(means)
