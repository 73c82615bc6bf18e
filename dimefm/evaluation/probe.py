"""Linear probes on cached features: find the hyperparameters, train a classifier, score the test images with it.

The image tower is frozen; the features are the unit-norm embeddings that zero-shot uses too. The search is ELEVATER's.
For each of six learning rates from 1e-6 to 0.1 it chooses one of 97 weight decays from 1e-6 to 1e6, by a walk that
halves its stride around the best so far. Each is trained for 10 epochs on four fifths of the training images and scored
by the set's own metric on the rest; the best is trained for 50 epochs on all of them. Two rules say which epoch counts:

    elevater    the best epoch on validation images while searching, and in the end the best of 50 epochs on the TEST
                images, as in ELEVATER's code: the result is test-selected, and is called so
    honest      the last epoch, both times: test images are looked at once, when everything is decided

With FEW validation images or less, honest searches for 50 epochs too. 10 epochs are then so few steps that a classifier
looks good whose weight decay leaves nothing of it after 50: it is one of many that get all validation images right.

Few-shot takes some images of each class first. The solver lbfgs is CLIP's logistic regression (scikit-learn's), with
the same walk over its regularisation; its rule is always honest.

Shapes: N images, B of a block, K classifiers, C classes, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from cache_schemas.evaluation import Metric, ProbeSelection, Solver
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import SourceError
from dimefm.evaluation import metrics
from dimefm.evaluation.features import Features
from dimefm.evaluation.intervals import mean_interval
from dimefm.evaluation.linear_heads import FeatureRows, Heads, train_heads
from dimefm.system.wording import counted

Array = np.ndarray[Any, Any]

RATES = np.logspace(-6, -1, 6).tolist()
DECAYS = np.logspace(-6, 6, 97).tolist()
SEARCH_EPOCHS, FINAL_EPOCHS, HELD_OUT = 10, 50, 0.2
FEW = 100  # validation images, of which one is a point or more: too few to tell settings apart that are nearly as good
_HEAD_BYTES = 512 << 20  # of the classifiers that are trained together
_LBFGS_BYTES = 8 << 30  # scikit-learn wants all features in memory, in float64 at times


@dataclass(frozen=True)
class ProbeResult:
    """Scores (N, C) of the test images, NaN for images that could not be read; the hyperparameters that were chosen,
    and how."""

    scores_NC: Array
    settings: dict[str, object]


def probe(
    train: Features,
    labels: Array,
    rows: Array,
    test: Features,
    images: ImageSet,
    metric: Metric,
    *,
    heads_CD: torch.Tensor,
    selection: ProbeSelection = "honest",
    solver: Solver = "sgd",
    epochs: int = SEARCH_EPOCHS,
    device: str = "cpu",
) -> ProbeResult:
    """Train on these rows of `train`, which have `labels`, and score the test `images`, whose features are `test`. The
    classifier starts from the class embeddings `heads_CD`; the search trains for `epochs`. Raises SourceError for too
    few training images."""
    readable = rows[train.readable[rows]]
    if solver == "lbfgs" and selection == "elevater":
        raise SourceError("the rule elevater chooses one of SGD's epochs, and lbfgs has none", remedy="take honest")
    held_out = validation_part(labels[readable])
    if held_out.all() or not held_out.any():
        what = f"{len(readable)} training images are too few to keep some for validation"
        raise SourceError(what, remedy="give two images or more of each class")
    settings: dict[str, object] = {"solver": solver, "selection": selection, "unreadable": len(rows) - len(readable)}
    settings["validation_images"] = int(held_out.sum())
    fit, check = readable[~held_out], readable[held_out]
    if solver == "lbfgs":
        scores_NC, chosen = _lbfgs(train, labels, fit, check, test, metric, len(heads_CD))
    else:
        sgd = _SgdProbe(train, labels, metric, heads_CD.to(device), selection, epochs)
        rate, decay, score = sgd.search(fit, check)
        scores_NC, epoch = sgd.train_final(readable, rate, decay, test, images.class_labels)
        chosen = {"learning_rate": rate, "weight_decay": decay, "validation": score, "epoch": epoch}
    scores_NC[~test.readable] = np.nan
    return ProbeResult(scores_NC, {**settings, **chosen})


def search_epochs(labels: Array, selection: ProbeSelection, solver: Solver) -> int:
    """How many epochs the search trains each classifier, given the labels of the training images."""
    few = selection == "honest" and solver == "sgd" and validation_part(labels).sum() <= FEW
    return FINAL_EPOCHS if few else SEARCH_EPOCHS


def note_on_few(settings: dict[str, object], metric: Metric) -> list[str]:
    """A note on a probe whose settings were chosen by too few validation images; none where they were enough."""
    count, value = settings["validation_images"], settings["validation"]
    assert isinstance(count, int)
    assert isinstance(value, float)
    if count > FEW:
        return []
    right = ""
    if metric == "accuracy":
        low, high = mean_interval(np.arange(count) < round(value * count))
        right = f" ({value:.0%} were right, interval [{low:.0%}, {high:.0%}])"
    return [
        f"the settings of the probe were chosen by {counted(count, 'validation image')}{right}: too few to tell good "
        "settings from bad ones; give more training images"
    ]


def validation_part(labels: Array) -> Array:
    """Which images are held out for validation, bool (N,), as ELEVATER chooses them: the first fifth of each class,
    rounded up. Where an image may have several labels, images are taken until each class has that many."""
    held_out = np.zeros(len(labels), bool)
    if labels.ndim == 1:
        for label in np.unique(labels):
            places = np.flatnonzero(labels == label)
            held_out[places[: int(np.ceil(HELD_OUT * len(places)))]] = True
        return held_out
    left = labels.copy()
    wanted = np.ceil(labels.sum(axis=0) * HELD_OUT)
    while len(short := np.flatnonzero((wanted > 0) & left.any(axis=0))):
        place = int(left[:, short[0]].argmax())
        held_out[place] = True
        wanted -= left[place]
        left[place] = False
    return held_out


def few_shot_rows(labels: Array, shots: int, seed: int) -> Array:
    """The rows of `shots` images of each class (or all that it has), drawn by `seed`, in ascending order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    if labels.ndim == 1:
        chosen = [order[labels[order] == label][:shots] for label in np.unique(labels)]
        return np.sort(np.concatenate(chosen))
    short, found = np.full(labels.shape[1], shots), []
    for row in order:
        if (labels[row] & (short > 0)).any():
            found.append(row)
            short = short - labels[row]
    return np.sort(np.array(found))


class _SgdProbe:
    """ELEVATER's probe: `search` finds the hyperparameters, `train_final` trains with them and scores test images."""

    def __init__(
        self,
        train: Features,
        labels: Array,
        metric: Metric,
        heads_CD: torch.Tensor,
        selection: ProbeSelection,
        epochs: int = SEARCH_EPOCHS,
    ) -> None:
        self._epochs = epochs
        self._train, self._labels, self._metric = train, labels, metric
        self._heads_CD, self._selection = heads_CD, selection
        self._device = str(heads_CD.device)
        self._targets = torch.from_numpy(labels.astype(np.float32) if labels.ndim == 2 else labels)

    def search(self, fit: Array, check: Array) -> tuple[float, float, float]:
        """The best learning rate, its weight decay and their score on the rows `check`, after training on `fit`. The
        walks of all learning rates go one stride at a time, so that their classifiers are trained together."""
        data = FeatureRows(self._train, fit, self._device)
        held_out = FeatureRows(self._train, check, self._device)
        walks = [_Walk(len(DECAYS)) for _ in RATES]
        while any(walk.places for walk in walks):
            pairs = [(rate, DECAYS[p]) for rate, walk in zip(RATES, walks, strict=True) for p in walk.places]
            scores = iter(self._scores(data, fit, held_out, check, pairs))
            for walk in walks:
                walk.step([next(scores) for _ in walk.places])
        best = max(range(len(RATES)), key=lambda i: (walks[i].top, -i))
        return RATES[best], DECAYS[walks[best].best], walks[best].top

    def _scores(
        self, data: FeatureRows, fit: Array, held_out: FeatureRows, check: Array, pairs: list[tuple[float, float]]
    ) -> list[float]:
        """The score of each pair of learning rate and weight decay, as many at a time as fit into memory."""
        found: list[float] = []
        bytes_each = 4 * 4 * self._heads_CD.numel()
        size = max(1, _HEAD_BYTES // bytes_each)
        for start in range(0, len(pairs), size):
            rates, decays = map(list, zip(*pairs[start : start + size], strict=True))
            best_K = np.zeros(len(rates))
            trained = train_heads(data, self._targets[fit], self._heads_CD, rates, decays, self._epochs)
            for epoch, heads in enumerate(trained, 1):
                if self._selection == "elevater" or epoch == self._epochs:
                    best_K = np.maximum(best_K, self._score_heads(heads, held_out, self._labels[check]))
            found += best_K.tolist()
        return found

    def _score_heads(self, heads: Heads, rows: FeatureRows, labels: Array) -> Array:
        """The metric of each classifier (K,) on these rows; 0 for a classifier that diverged."""
        blocks = (heads.logits(block_BD) for block_BD in rows.blocks(heads.bias.numel()))
        if self._metric in ("map_11_point", "roc_auc"):
            return self._score_rankings(blocks, labels)
        return self._score_best_classes(blocks, labels)

    def _score_rankings(self, blocks: Iterable[torch.Tensor], labels: Array) -> Array:
        """From logits (B, K, C): the area under the curve and mAP rank all images of a class, by their scores."""
        logits_NKC = torch.cat([logits_BKC.cpu() for logits_BKC in blocks]).numpy()
        classifiers = range(logits_NKC.shape[1])
        return np.array([_metric(self._probabilities(logits_NKC[:, k]), labels, self._metric) for k in classifiers])

    def _score_best_classes(self, blocks: Iterable[torch.Tensor], labels: Array) -> Array:
        """From logits (B, K, C): accuracies need only the best class of each image. The logits of a quarter of a
        million images, 42 classifiers and 1,000 classes would fit into no memory."""
        best, finite = [], []
        for logits_BKC in blocks:
            best.append(logits_BKC.argmax(dim=2).cpu())
            finite.append(logits_BKC.isfinite().all(dim=2).all(dim=0))
        correct_NK = torch.cat(best).numpy() == labels[:, None]
        finite_K = torch.stack(finite).all(dim=0).cpu().numpy()
        value_K = [_share(correct_NK[:, k], labels, self._metric) for k in range(correct_NK.shape[1])]
        return np.where(finite_K, value_K, 0.0)

    def _probabilities(self, logits_NC: Array) -> Array:
        """What the area under the curve and mAP rank by. ELEVATER takes the softmax even if an image may have several
        labels."""
        with np.errstate(invalid="ignore", over="ignore"):
            several = self._labels.ndim == 2 and self._selection == "honest"
            found: Array = expit(logits_NC.astype(np.float64)) if several else softmax(logits_NC, axis=1)
        return found

    def train_final(self, rows: Array, rate: float, decay: float, test: Features, labels: Array) -> tuple[Array, int]:
        """Scores of the test images after training on all rows, and the epoch that they are of."""
        data = FeatureRows(self._train, rows, self._device)
        everything = FeatureRows(test, np.arange(len(test)), self._device)
        top, chosen, scores_NC = -1.0, 0, np.zeros((len(test), len(self._heads_CD)), np.float32)
        trained = train_heads(data, self._targets[rows], self._heads_CD, [rate], [decay], FINAL_EPOCHS)
        for epoch, heads in enumerate(trained, 1):
            if self._selection == "honest" and epoch < FINAL_EPOCHS:
                continue
            logits_NC = torch.cat([heads.logits(block_BD)[:, 0].cpu() for block_BD in everything.blocks()]).numpy()
            epoch_scores_NC = np.nan_to_num(self._probabilities(logits_NC))
            value = _metric(epoch_scores_NC[test.readable], labels[test.readable], self._metric)
            if value > top:
                top, chosen, scores_NC = value, epoch, epoch_scores_NC
        return scores_NC, chosen


class _Walk:
    """A search for the best of `size` places. It looks at every `first`-th place, then on both sides of the best so far
    at half that stride, and so on down to a stride of 1. The first of equal scores stays, also where all are 0.

    The caller scores `places` and hands the scores to `step`, so that several walks can share the work.
    """

    def __init__(self, size: int, first: int = 16) -> None:
        self._size, self._stride = size, first
        self.places = list(range(0, size, first))
        self.best, self.top = 0, 0.0

    def step(self, scores: Iterable[float]) -> None:
        """Take the scores of `places`, and set `places` to the next ones; there are none at the end."""
        for place, value in zip(self.places, scores, strict=True):
            if value > self.top:
                self.best, self.top = place, value
        self._stride //= 2
        around = (max(self.best - self._stride, 0), min(self.best + self._stride, self._size - 1))
        self.places = [place for place in around if place != self.best] if self._stride else []


def _metric(scores_NC: Array, labels: Array, metric: Metric) -> float:
    """The set's own metric; 0 if scores are not finite, and if the metric is not defined for these labels."""
    if not np.isfinite(scores_NC).all():
        return 0.0
    try:
        if metric == "map_11_point":
            return metrics.map_11_point(scores_NC, labels)
        if metric == "roc_auc":
            return metrics.roc_auc(scores_NC[:, 1], labels)
        return _share(metrics.topk_correct(scores_NC, labels, 1), labels, metric)
    except ValueError:
        return 0.0


def _share(correct_N: Array, labels_N: Array, metric: Metric) -> float:
    """The share of right answers over all images, or its mean over classes."""
    return metrics.mean_per_class(correct_N, labels_N) if metric == "mean_per_class" else float(correct_N.mean())


def _lbfgs(
    train: Features, labels: Array, fit: Array, check: Array, test: Features, metric: Metric, classes: int
) -> tuple[Array, dict[str, object]]:
    """Scores and settings of CLIP's probe (Radford et al. 2021, appendix A.3): logistic regression by L-BFGS, at most
    1,000 iterations, with the L2 strength that a walk finds. A class without a training image scores 0."""
    size = (len(fit) + len(check)) * train.store.schema.dim * 8
    if size > _LBFGS_BYTES:
        what = f"lbfgs needs all features in memory, {size / 1e9:.0f} GB of them"
        raise SourceError(what, remedy="take the solver sgd, whose memory is bounded")
    features_ND, checked_ND = train.take(fit), train.take(check)

    def fitted(x_ND: Array, y: Array, decay: float) -> Any:
        single = LogisticRegression(C=1 / decay, max_iter=1000)
        model = OneVsRestClassifier(single) if labels.ndim == 2 else single
        if labels.ndim == 1 and (y == y[0]).all():  # which LogisticRegression refuses
            model = DummyClassifier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "Label .* is present in all training examples", UserWarning)
            return model.fit(x_ND, y)

    def scores_of(model: Any, x_ND: Array) -> Array:
        scores_NC = np.zeros((len(x_ND), classes))
        found = model.predict_proba(x_ND)
        scores_NC[:, np.arange(classes) if labels.ndim == 2 else model.classes_] = found
        return scores_NC

    walking = _Walk(len(DECAYS))
    while walking.places:
        models = [fitted(features_ND, labels[fit], DECAYS[place]) for place in walking.places]
        walking.step([_metric(scores_of(model, checked_ND), labels[check], metric) for model in models])
    decay = DECAYS[walking.best]
    both = np.sort(np.concatenate([fit, check]))
    scores_NC = scores_of(fitted(train.take(both), labels[both], decay), test.all())
    return scores_NC, {"l2": decay, "validation": walking.top}
