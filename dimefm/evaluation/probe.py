"""Linear probes on cached features: which hyperparameters, and what the classifier that they give says of the test
images. The tower is frozen; features are the unit-norm embeddings that zero-shot uses too.

The search is ELEVATER's: for each of six learning rates from 1e-6 to 0.1, the weight decay among 97 from 1e-6 to 1e6 by
a walk that halves its stride about the best; 10 epochs each on four fifths of the training images, scored by the set's
own metric on the rest; then 50 epochs on all of them. Two rules of what is reported:

    elevater    the best epoch on validation images while searching, and at last the best of 50 epochs on the TEST
                images, as ELEVATER's code does: the result is test-selected, and is called so
    honest      the last epoch, both times: test images are looked at once, when everything is decided

Few-shot takes some images of each class first. The solver lbfgs is CLIP's logistic regression (scikit-learn's), with
the same walk over its regularisation; its rule is always honest. Shapes: N images, K classifiers, C classes, D width.
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
from dimefm.evaluation.linear_heads import FeatureRows, Heads, train_heads

Array = np.ndarray[Any, Any]

RATES = np.logspace(-6, -1, 6).tolist()
DECAYS = np.logspace(-6, 6, 97).tolist()
SEARCH_EPOCHS, FINAL_EPOCHS, HELD_OUT = 10, 50, 0.2
_HEAD_BYTES = 512 << 20  # of classifiers that are trained at once
_LBFGS_BYTES = 8 << 30  # scikit-learn wants all features in memory, in float64 at times


@dataclass(frozen=True)
class ProbeResult:
    """Scores (N, C) of the test images, NaN for those that could not be read; what was chosen, and how."""

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
    device: str = "cpu",
) -> ProbeResult:
    """Train on these rows of `train` and score the test `images`. Raises SourceError where they are too few."""
    readable = rows[train.readable[rows]]
    if solver == "lbfgs" and selection == "elevater":
        raise SourceError("the rule elevater chooses among SGD's epochs, and lbfgs has none", remedy="take honest")
    held_out = validation_part(labels[readable])
    if held_out.all() or not held_out.any():
        what = f"{len(readable)} training images are too few to keep some for validation"
        raise SourceError(what, remedy="give two images or more of each class")
    settings: dict[str, object] = {"solver": solver, "selection": selection, "unreadable": len(rows) - len(readable)}
    fit, check = readable[~held_out], readable[held_out]
    if solver == "lbfgs":
        scores_NC, chosen = _lbfgs(train, labels, fit, check, test, metric, len(heads_CD))
    else:
        search = _Sgd(train, labels, metric, heads_CD.to(device), selection)
        rate, decay, score = search.search(fit, check)
        scores_NC, epoch = search.final(readable, rate, decay, test, images.class_labels)
        chosen = {"learning_rate": rate, "weight_decay": decay, "validation": score, "epoch": epoch}
    scores_NC[~test.readable] = np.nan
    return ProbeResult(scores_NC, {**settings, **chosen})


def validation_part(labels: Array) -> Array:
    """Bool (N,): a fifth of each class, rounded up, the first that come; of several labels an image, images are taken
    until each class has that many. As ELEVATER does it."""
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
    """FeatureRows of `shots` images of each class, or of all that it has, drawn by `seed`; in ascending order."""
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


class _Sgd:
    def __init__(
        self, train: Features, labels: Array, metric: Metric, heads_CD: torch.Tensor, selection: ProbeSelection
    ) -> None:
        self._train, self._labels, self._metric = train, labels, metric
        self._heads_CD, self._selection = heads_CD, selection
        self._device = str(heads_CD.device)
        self._targets = torch.from_numpy(labels.astype(np.float32) if labels.ndim == 2 else labels)

    def search(self, fit: Array, check: Array) -> tuple[float, float, float]:
        """Learning rate, weight decay and score of the best: all rates walk at once, a stride at a time."""
        data = FeatureRows(self._train, fit, self._device)
        held_out = FeatureRows(self._train, check, self._device)
        walks = [_Walk(len(DECAYS)) for _ in RATES]
        while any(w.places for w in walks):
            pairs = [(rate, DECAYS[p]) for rate, w in zip(RATES, walks, strict=True) for p in w.places]
            scores = iter(self._scores(data, fit, held_out, check, pairs))
            for w in walks:
                w.step([next(scores) for _ in w.places])
        best = max(range(len(RATES)), key=lambda i: (walks[i].top, -i))
        return RATES[best], DECAYS[walks[best].best], walks[best].top

    def _scores(
        self, data: FeatureRows, fit: Array, held_out: FeatureRows, check: Array, pairs: list[tuple[float, float]]
    ) -> list[float]:
        found: list[float] = []
        bytes_each = 4 * 4 * self._heads_CD.numel()
        size = max(1, _HEAD_BYTES // bytes_each)
        for start in range(0, len(pairs), size):
            rates, decays = map(list, zip(*pairs[start : start + size], strict=True))
            best = np.zeros(len(rates))
            trained = train_heads(data, self._targets[fit], self._heads_CD, rates, decays, SEARCH_EPOCHS)
            for epoch, heads in enumerate(trained, 1):
                if self._selection == "elevater" or epoch == SEARCH_EPOCHS:
                    best = np.maximum(best, self._value(heads, held_out, self._labels[check]))
            found += best.tolist()
        return found

    def _value(self, heads: Heads, rows: FeatureRows, labels: Array) -> Array:
        """The metric of each classifier (K,); 0 of one that diverged. Of accuracies only the best class of an image is
        kept: all scores of a quarter of a million images, 42 classifiers and 1,000 classes are more than any memory."""
        blocks = (heads.logits(block) for block in rows.blocks(heads.bias.numel()))
        if self._metric in ("map_11_point", "roc_auc"):
            scores_NKC = torch.cat([logits_BKC.cpu() for logits_BKC in blocks]).numpy()
            each = [_metric(self._ranked(scores_NKC[:, k]), labels, self._metric) for k in range(heads.count)]
            return np.array(each)
        best, finite = zip(*((x.argmax(dim=2).cpu(), x.isfinite().all(dim=2).all(dim=0)) for x in blocks), strict=True)
        correct_NK = torch.cat(best).numpy() == labels[:, None]
        each = [_share(correct_NK[:, k], labels, self._metric) for k in range(heads.count)]
        return np.where(torch.stack(finite).all(dim=0).cpu().numpy(), each, 0.0)

    def _ranked(self, logits_NC: Array) -> Array:
        """Probabilities, which the area under the curve and mAP rank by: ELEVATER takes the softmax even of several
        labels an image."""
        with np.errstate(invalid="ignore", over="ignore"):
            several = self._labels.ndim == 2 and self._selection == "honest"
            found: Array = expit(logits_NC.astype(np.float64)) if several else softmax(logits_NC, axis=1)
        return found

    def final(self, rows: Array, rate: float, decay: float, test: Features, labels: Array) -> tuple[Array, int]:
        """Scores of the test images after training on all rows, and of which epoch they are."""
        data = FeatureRows(self._train, rows, self._device)
        everything = FeatureRows(test, np.arange(len(test)), self._device)
        top, chosen, scores_NC = -1.0, 0, np.zeros((len(test), len(self._heads_CD)), np.float32)
        trained = train_heads(data, self._targets[rows], self._heads_CD, [rate], [decay], FINAL_EPOCHS)
        for epoch, heads in enumerate(trained, 1):
            if self._selection == "honest" and epoch < FINAL_EPOCHS:
                continue
            logits_NC = torch.cat([heads.logits(block)[:, 0].cpu() for block in everything.blocks()]).numpy()
            ranked_NC = np.nan_to_num(self._ranked(logits_NC))
            readable = test.readable
            value = _metric(ranked_NC[readable], labels[readable], self._metric)
            if value > top:
                top, chosen, scores_NC = value, epoch, ranked_NC
        return scores_NC, chosen


class _Walk:
    """The best place among `size`: every `first`-th, then at half that stride about the best so far, down to 1. Of
    equal scores the first that was seen stays. A step at a time, so that several walks share the work of one."""

    def __init__(self, size: int, first: int = 16) -> None:
        self._size, self._stride = size, first
        self.places = list(range(0, size, first))
        self.best, self.top = -1, 0.0

    def step(self, scores: Iterable[float]) -> None:
        """Take the scores of `places`, and say which come next; none at the end."""
        for place, value in zip(self.places, scores, strict=True):
            if value > self.top:
                self.best, self.top = place, value
        self._stride //= 2
        around = (max(self.best - self._stride, 0), min(self.best + self._stride, self._size - 1))
        self.places = [place for place in around if place != self.best] if self._stride else []


def _metric(scores_NC: Array, labels: Array, metric: Metric) -> float:
    """The set's own metric; 0 of scores that are not finite, and where it is not defined."""
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
    """The share of right answers, of all images or the mean over classes."""
    return metrics.mean_per_class(correct_N, labels_N) if metric == "mean_per_class" else float(correct_N.mean())


def _lbfgs(
    train: Features, labels: Array, fit: Array, check: Array, test: Features, metric: Metric, classes: int
) -> tuple[Array, dict[str, object]]:
    """CLIP's probe (Radford et al. 2021, appendix A.3): L-BFGS, at most 1,000 iterations, the L2 strength by a walk. A
    class that has no training image scores 0."""
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
