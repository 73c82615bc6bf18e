"""Every metric against another implementation: scikit-learn, the definition in plain Python, or a plain bootstrap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from dimefm.evaluation.intervals import (
    bootstrap_interval,
    difference_interval,
    map_11_point_interval,
    mean_interval,
    mean_per_class_interval,
    retrieval_intervals,
    roc_auc_interval,
)
from dimefm.evaluation.metrics import (
    average_precision_11_point,
    confusion,
    effective_robustness,
    map_11_point,
    mean_per_class,
    retrieval_recall,
    roc_auc,
    topk_correct,
)
from dimefm.evaluation.suite_means import mean_of

GOLDEN = Path(__file__).parents[1] / "golden" / "map_11_point.json"
SEEDS = st.integers(0, 2**32 - 1)


def plain_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Pairs in the right order, equal ones as half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    return won / (len(positive) * len(negative))


def plain_ap11(scores: list[float], positive: list[bool], first: float | None = 1.0) -> float:
    """VOC2007's definition over the thresholds on the score; `first`: precision at recall 0, None for the devkit's."""
    curve = [] if first is None else [(0.0, first)]
    for threshold in set(scores):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        curve.append((sum(taken) / sum(positive), sum(taken) / len(taken)))
    total = 0.0
    for tenths in range(11):
        total += max((p for r, p in curve if r >= tenths / 10 - 1e-9), default=0.0)
    return total / 11


def plain_bootstrap(metric: Callable[[np.ndarray], float], images: int, resamples: int) -> tuple[float, float]:
    """Of `metric` of the drawn images, those where it is NaN left out."""
    rng = np.random.default_rng(99)
    values = [metric(rng.integers(0, images, images)) for _ in range(resamples)]
    return tuple(np.nanpercentile(values, [2.5, 97.5]))  # type: ignore[return-value]


# Top-k and the mean per class


@given(SEEDS, st.integers(1, 40), st.integers(3, 9), st.integers(1, 9))
@settings(deadline=None)
def test_topk_is_scikit_learns(seed: int, images: int, classes: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.arange(images * classes, dtype=np.float32)).reshape(images, classes)
    labels = rng.integers(0, classes, images)
    correct = topk_correct(scores, labels, k)
    assert correct.dtype == bool
    assert correct.shape == (images,)
    if k < classes:  # scikit-learn warns of others
        assert correct.mean() == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=np.arange(classes)))
    else:
        assert correct.all()


@given(SEEDS, st.integers(1, 20), st.integers(5, 30))
@settings(deadline=None)
def test_equal_scores_are_taken_as_argmax_and_torch_take_them(seed: int, images: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 3, (images, classes)).astype(np.float64), rng.integers(0, classes, images)
    first = [row.index(max(row)) == label for row, label in zip(scores.tolist(), labels, strict=True)]
    assert topk_correct(scores, labels, 1).tolist() == first
    found = torch.tensor(scores, dtype=torch.float32).topk(5, 1, True, True)[1].t()  # as CLIP_benchmark has it
    expected = found.eq(torch.tensor(labels).view(1, -1).expand_as(found)).any(dim=0)
    assert topk_correct(scores, labels, 5).tolist() == expected.tolist()


def test_top_1_is_the_first_of_equal_scores_and_top_k_takes_k_of_them() -> None:
    scores, labels = np.zeros((7, 7)), np.arange(7)
    assert topk_correct(scores, labels, 1).tolist() == [True] + 6 * [False]
    assert topk_correct(scores, labels, 5).sum() == 5


def test_the_first_of_the_five_best_is_torchs_and_not_argmax_where_scores_are_equal() -> None:
    scores = np.random.default_rng(0).integers(0, 3, (200, 40)).astype(np.float32)
    labels = torch.from_numpy(scores).topk(5, 1, True, True).indices[:, 0].numpy()
    assert topk_correct(scores, labels, 1, among=5).all()
    assert not topk_correct(scores, labels, 1).all()


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_an_unreadable_image_is_wrong_whatever_its_label_and_k(k: int) -> None:
    scores = np.full((5, 5), np.nan, np.float32)
    scores[3] = [0, 0, 0, 9, 0]
    assert topk_correct(scores, np.arange(5), k).tolist() == [False, False, False, True, False]


def test_topk_takes_an_array_that_cannot_be_written_to() -> None:
    scores = np.broadcast_to(np.arange(6.0), (2, 6))
    assert topk_correct(scores[:, ::-1], np.array([0, 5]), 2).tolist() == [True, False]


@given(SEEDS, st.integers(1, 60), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None)
def test_mean_per_class_is_balanced_accuracy(seed: int, images: int, classes: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    labels = 2 * rng.integers(0, classes, images)  # odd classes never occur
    correct = rng.random(images) < share
    if len(np.unique(labels)) > 1:  # of one class scikit-learn warns
        seen = labels[~correct][:1] if (~correct).any() else labels[:1]
        wrong = np.where(labels == seen, np.unique(labels[labels != seen])[0], seen)
        expected = balanced_accuracy_score(labels, np.where(correct, labels, wrong))
        assert mean_per_class(correct, labels) == pytest.approx(expected)
    else:
        assert mean_per_class(correct, labels) == pytest.approx(correct.mean())
    drawn = rng.integers(0, images, images)
    weighted = mean_per_class(correct, labels, np.bincount(drawn, minlength=images))
    assert weighted == pytest.approx(mean_per_class(correct[drawn], labels[drawn]))


# ROC AUC


@given(SEEDS, st.integers(2, 40), st.sampled_from([1, 3, 10**6]))
@settings(deadline=None)
def test_roc_auc_counts_pairs(seed: int, images: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, levels, images).astype(float), rng.permutation(np.arange(images) % 2)
    scores[rng.random(images) < 0.1] = np.nan
    assert roc_auc(scores, labels) == pytest.approx(plain_auc(np.nan_to_num(scores, nan=-1.0), labels))


def test_roc_auc_at_its_ends() -> None:
    labels = np.array([0, 1, 1, 0])
    assert roc_auc(labels.astype(float), labels) == 1
    assert roc_auc(-labels.astype(float), labels) == 0
    assert roc_auc(np.zeros(4), labels) == 0.5
    assert roc_auc(np.full(4, np.nan), labels) == 0.5
    assert roc_auc_interval(np.zeros(4), labels) == (0.5, 0.5)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [0, 1, 2]])
@pytest.mark.parametrize("metric", [roc_auc, roc_auc_interval])
def test_roc_auc_needs_two_classes(metric: Callable[..., object], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="class 0 and class 1"):
        metric(np.arange(3.0), np.array(labels))


# 11-point average precision


@given(SEEDS, st.integers(1, 40), st.sampled_from([1, 4, 10**6]), st.sampled_from([0.05, 0.5, 1.0]))
@settings(deadline=None)
def test_average_precision_is_its_definition(seed: int, images: int, levels: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, levels, images).astype(float), rng.random(images) < share
    positive[rng.integers(images)] = True
    scores[rng.random(images) < 0.1] = np.nan
    expected = plain_ap11(np.nan_to_num(scores, nan=-1.0).tolist(), positive.tolist())
    assert average_precision_11_point(scores, positive) == pytest.approx(expected)


def test_average_precision_is_the_devkits_where_the_first_image_is_positive() -> None:
    scores, positive = [9.0, 8.0, 7.0, 6.0, 5.0], [True, False, True, True, False]
    ours = average_precision_11_point(np.array(scores), np.array(positive))
    assert ours == pytest.approx(plain_ap11(scores, positive, first=None))
    assert ours == pytest.approx((4 * 1 + 7 * 0.75) / 11)


def test_average_precision_at_its_ends() -> None:
    positive = np.arange(100) < 10
    assert average_precision_11_point(-np.arange(100.0), positive) == 1
    assert average_precision_11_point(np.zeros(100), positive) == pytest.approx((1 + 10 * 0.1) / 11)
    with pytest.raises(ValueError, match="none of 3 images"):
        average_precision_11_point(np.arange(3.0), np.zeros(3, bool))


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: f"seed {case['seed']}")
def test_map_is_that_of_vision_evaluation(case: dict[str, float]) -> None:
    """The file has what MeanAveragePrecisionNPointsEvaluator(11) of vision_evaluation 0.2.14, with scikit-learn 1.9.1
    and numpy 2.4.6, gave for the arrays that are made here, ties, classes without positives and one image included."""
    rng, shape = np.random.default_rng(int(case["seed"])), (int(case["images"]), int(case["classes"]))
    scores = np.floor(rng.random(shape) * case["levels"]) / case["levels"]
    positives = rng.random(shape) < case["share"]
    assert positives.any(axis=0).sum() == case["classes_with_positive"]
    assert map_11_point(scores, positives) == pytest.approx(case["map_11_point"], abs=1e-12)


def test_an_unreadable_image_comes_last_in_every_class_of_map() -> None:
    scores = np.array([[np.nan, np.nan], [0.1, 0.2], [0.3, -np.inf]])
    positives = np.array([[True, True], [False, True], [False, False]])
    last = np.where(np.isnan(scores), -1e9, scores)
    assert map_11_point(scores, positives) == map_11_point(np.where(np.isinf(last), -1e9, last), positives)
    assert map_11_point(scores[:, :1], positives[:, :1]) == pytest.approx((1 + 10 / 3) / 11)


# Retrieval


@given(SEEDS, st.integers(1, 12), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_retrieval_is_brute_force(seed: int, images: int, most: int, lost: bool) -> None:
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), rng.integers(1, most + 1, images)))
    image, text = rng.standard_normal((images, 6)), rng.standard_normal((len(owner), 6))
    if lost:
        image[0] = np.nan
    scores = np.nan_to_num(image @ text.T, nan=-np.inf)
    found = retrieval_recall(image, text, owner, [1, 3, 50])
    assert len(found) == 6
    for k in (1, 3, 50):
        nearest_texts = [sorted(range(len(owner)), key=lambda m, n=n: -scores[n, m])[:k] for n in range(images)]
        nearest_images = [sorted(range(images), key=lambda n, m=m: -scores[n, m])[:k] for m in range(len(owner))]
        to_text = [n in owner[near] and not (lost and n == 0) for n, near in enumerate(nearest_texts)]
        to_image = [owner[m] in near and not (lost and owner[m] == 0) for m, near in enumerate(nearest_images)]
        assert found[f"text_retrieval_recall@{k}"].tolist() == to_text
        assert found[f"image_retrieval_recall@{k}"].tolist() == to_image


def test_retrieval_by_blocks_is_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image, text, owner = rng.standard_normal((9, 4)), rng.standard_normal((27, 4)), np.arange(27) % 9
    whole = retrieval_recall(image, text, owner, [1, 2])
    monkeypatch.setattr("dimefm.evaluation.metrics._QUERIES", 4)
    blocks = retrieval_recall(image, text, owner, [1, 2])
    assert {name: hits.tolist() for name, hits in whole.items()} == {n: h.tolist() for n, h in blocks.items()}
    assert 0 < whole["text_retrieval_recall@2"].mean() < 1


@pytest.mark.parametrize(
    ("owner", "k", "problem"),
    [([0, 0], 1, "2 of 3 images have no text"), ([0, 3], 1, "images 0 to 3"), ([0, 1], 0, "k is 0")],
)
def test_retrieval_refuses(owner: list[int], k: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        retrieval_recall(np.eye(3), np.eye(3)[:2], np.array(owner), [k])
    with pytest.raises(ValueError, match="text is NaN"):
        retrieval_recall(np.eye(2), np.full((2, 2), np.nan), np.arange(2), [1])


# Intervals


@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_are_those_of_a_plain_bootstrap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, classes = 300, 7
    labels, correct = rng.integers(0, classes, images), rng.random(images) < 0.6
    binary = (labels < 2).astype(int)
    scores = np.round(rng.standard_normal(images) + binary, 1)
    positives = np.eye(classes, dtype=bool)[labels] | (rng.random((images, classes)) < 0.05)
    class_scores = np.round(rng.standard_normal((images, classes)) + positives, 1)
    class_scores[5] = np.nan
    for interval, plain, resamples in [
        (mean_interval(correct), lambda i: correct[i].mean(), 4000),
        (mean_per_class_interval(correct, labels), lambda i: mean_per_class(correct[i], labels[i]), 4000),
        (roc_auc_interval(scores, binary), lambda i: plain_auc(scores[i], binary[i]), 200),
        (map_11_point_interval(class_scores, positives), lambda i: map_11_point(class_scores[i], positives[i]), 1000),
    ]:
        low, high = plain_bootstrap(plain, images, resamples)
        tolerance = (0.15 if resamples > 200 else 0.25) * (high - low)
        assert interval == (pytest.approx(low, abs=tolerance), pytest.approx(high, abs=tolerance))
        assert 0.01 < interval[1] - interval[0] < 0.2


@pytest.mark.parametrize("levels", [1, 5, 10**6])
def test_fast_intervals_draw_the_resamples_of_the_general_one(levels: int) -> None:
    rng = np.random.default_rng(3)
    scores, positives = rng.integers(0, levels, (25, 3)).astype(float), rng.random((25, 3)) < 0.15
    labels = positives[:, 0].astype(np.int64)
    assert positives.any(axis=0).all()
    assert not positives[:, 0].all()

    def area(counts: np.ndarray) -> float:
        drawn = np.repeat(np.arange(25), counts)
        return plain_auc(scores[drawn, 0], labels[drawn]) if len(set(labels[drawn])) == 2 else np.nan

    def average(counts: np.ndarray) -> float:
        drawn = np.repeat(np.arange(25), counts)
        return map_11_point(scores[drawn], positives[drawn]) if positives[drawn].any() else np.nan

    expected = bootstrap_interval(area, 25, resamples=150, seed=4)
    assert roc_auc_interval(scores[:, 0], labels, resamples=150, seed=4) == pytest.approx(expected)
    expected = bootstrap_interval(average, 25, resamples=150, seed=4)
    assert map_11_point_interval(scores, positives, resamples=150, seed=4) == pytest.approx(expected)


def test_intervals_cover_what_is_true_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    labels, rate = np.arange(400) % 4, np.array([0.5, 0.7, 0.8, 0.9])
    exact = general = per_class = 0
    for _ in range(200):
        correct = rng.random(400) < rate[labels]
        low, high = mean_interval(correct)
        exact += low <= rate.mean() <= high
        low, high = bootstrap_interval(lambda counts, c=correct: float(counts @ c) / 400, 400, resamples=400)
        general += low <= rate.mean() <= high
        low, high = mean_per_class_interval(correct, labels)
        per_class += low <= rate.mean() <= high
    for covered in (exact, general, per_class):
        assert 184 <= covered <= 196


BOTH = ["text_retrieval_recall@1", "image_retrieval_recall@1"]


def alike(
    rng: np.random.Generator, images: int, share: float, alike: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Hits of images with 1 to 9 captions each, where the queries of one image are `alike`: a beta-binomial draw, whose
    recall is `share` in both directions."""
    owner = np.repeat(np.arange(images), rng.integers(1, 10, images))
    rate_N = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), images)
    return dict(zip(BOTH, (rng.random(images) < rate_N, rng.random(len(owner)) < rate_N[owner]), strict=True)), owner


def coverage(images: int, share: float, alikeness: float, trials: int, resamples: int) -> dict[str, float]:
    """How often the interval of each recall, and of their mean, has the truth; "apart": with captions independent."""
    rng, covered = np.random.default_rng(0), dict.fromkeys([*BOTH, "mean", "apart"], 0)
    for trial in range(trials):
        hits, owner = alike(rng, images, share, alikeness)
        found = retrieval_intervals(hits, owner, {"mean": BOTH}, resamples=resamples, seed=trial)
        found["apart"] = mean_interval(hits[BOTH[1]])
        for name, (low, high) in found.items():
            covered[name] += low <= share <= high
    return {name: count / trials for name, count in covered.items()}


def test_intervals_of_recall_cover_what_is_true_though_captions_of_an_image_are_alike() -> None:
    found = coverage(images=120, share=0.4, alikeness=0.4, trials=250, resamples=150)
    assert found.pop("apart") < 0.85
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "share", "alikeness"),
    [(30, 0.5, 0.3), (100, 0.15, 0.3), (100, 0.8, 0.6), (239, 0.15, 0.3), (1000, 0.9, 0.5)],
)
def test_intervals_of_recall_cover_what_is_true(images: int, share: float, alikeness: float) -> None:
    found = coverage(images, share, alikeness, trials=400, resamples=200)
    assert found.pop("apart") < 0.9
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


@pytest.mark.parametrize("images", [10, 20, 50, 200])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.97])
def test_intervals_of_accuracy_cover_what_is_true_with_few_images(images: int, rate: float) -> None:
    """Exactly, over every number of right answers: an interval of a few values cannot be at 95 everywhere."""
    rights = np.arange(images + 1)
    inside = [low <= rate <= high for low, high in (mean_interval(np.arange(images) < right) for right in rights)]
    assert 0.9 <= binom.pmf(rights, images, rate)[inside].sum() <= 0.995


@pytest.mark.parametrize(("classes", "of_each"), [(100, 5), (10, 30), (400, 1)])
def test_intervals_of_the_mean_per_class_cover_what_is_true_of_these_classes(classes: int, of_each: int) -> None:
    rng, labels, covered = np.random.default_rng(0), np.repeat(np.arange(classes), of_each), 0
    for _ in range(300):
        rate = rng.beta(1.0, 1.0, classes)
        low, high = mean_per_class_interval(rng.random(len(labels)) < rate[labels], labels)
        covered += low <= rate.mean() <= high
    assert covered >= 0.92 * 300
    assert covered <= 0.985 * 300 or of_each == 1, "one image a class does not tell how far it varies: wider is right"


def test_an_image_is_drawn_with_its_captions_and_for_both_directions() -> None:
    """Against resampled lists of hits, put together by hand."""
    rng = np.random.default_rng(1)
    hits, owner = alike(rng, 60, 0.5, 0.5)
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        captions = np.concatenate([hits[BOTH[1]][owner == image] for image in drawn])
        means.append([hits[BOTH[0]][drawn].mean(), captions.mean()])
    values = {name: hit.mean() for name, hit in hits.items()}
    found = retrieval_intervals(hits, owner, {"mean": BOTH}, resamples=4000)
    both = np.array(means)
    for name, drawn, value in (
        (BOTH[0], both[:, 0], values[BOTH[0]]),
        (BOTH[1], both[:, 1], values[BOTH[1]]),
        ("mean", both.mean(axis=1), np.mean(list(values.values()))),
    ):
        low, high = found[name]
        assert high - low == pytest.approx(2 * 1.96 * drawn.std(), rel=0.06)
        assert low < value < high
    shuffled = rng.permutation(len(owner))
    again = retrieval_intervals({BOTH[1]: hits[BOTH[1]][shuffled]}, owner[shuffled], {}, resamples=4000)
    assert again[BOTH[1]] == pytest.approx(found[BOTH[1]]), "in whatever order captions come"
    with pytest.raises(ValueError, match="one length"):
        retrieval_intervals({BOTH[0]: hits[BOTH[1]]}, owner, {})


@pytest.mark.parametrize("images", [1, 3, 20, 1000])
def test_what_was_always_right_in_a_few_images_may_be_wrong_in_others(images: int) -> None:
    """A point would claim that it never is: of n images none is wrong in 5 of 100 cases where 3 / n are."""
    labels = np.arange(images) % 3
    for value in (False, True):
        low, high = mean_interval(np.full(images, value))
        assert mean_per_class_interval(np.full(images, value), labels) == pytest.approx((low, high))
        assert (low == 0, high == 1) == (not value, value)
        assert high - low == pytest.approx(1.96**2 / (images + 1.96**2), rel=1e-3)


def test_an_interval_holds_its_value() -> None:
    rng = np.random.default_rng(0)
    for images in (1, 2, 5, 40):
        for _ in range(20):
            correct, labels = rng.random(images) < rng.random(), rng.integers(0, 4, images)
            for value, (low, high) in (
                (correct.mean(), mean_interval(correct)),
                (mean_per_class(correct, labels), mean_per_class_interval(correct, labels)),
            ):
                assert 0 <= low <= value <= high <= 1


def test_intervals_of_what_does_not_vary() -> None:
    assert map_11_point_interval(np.zeros((1, 2)), np.array([[True, False]])) == (1, 1)
    assert map_11_point_interval(np.zeros((3, 2)), np.zeros((3, 2), bool)) == (0, 0)


def test_intervals_are_deterministic_for_a_seed() -> None:
    rng = np.random.default_rng(0)
    correct, labels, scores = rng.random(90) < 0.5, rng.integers(0, 3, 90), rng.standard_normal((90, 3))
    positives = np.eye(3, dtype=bool)[labels]
    for interval in (
        lambda seed: retrieval_intervals({"image_recall": correct}, np.arange(90) // 3, {}, seed=seed)["image_recall"],
        lambda seed: roc_auc_interval(scores[:, 0], correct, seed=seed),
        lambda seed: map_11_point_interval(scores, positives, seed=seed),
        lambda seed: bootstrap_interval(lambda counts: float(counts @ correct) / 90 + counts[0] / 1e6, 90, seed=seed),
    ):
        assert interval(1) == interval(1) != interval(2)


def test_a_metric_that_no_resample_has_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="every resample"):
        bootstrap_interval(lambda counts: np.nan, 5)


# Summaries


def test_mean_of_sets() -> None:
    assert mean_of([0.5], [(0.4, 0.6)]) == (0.5, (pytest.approx(0.4), pytest.approx(0.6)))
    mean, (low, high) = mean_of([0.2, 0.6], [(0.17, 0.23), (0.56, 0.64)])
    assert (mean, low, high) == (pytest.approx(0.4), pytest.approx(0.375), pytest.approx(0.425))
    assert mean_of([1.0, 0.99], [(0.9, 1.0), (0.95, 1.0)])[1][1] == 1
    for values, intervals in [([], []), ([0.5], []), ([1.5], [(1, 2)]), ([np.nan], [(0, 1)])]:
        with pytest.raises(ValueError, match="a mean of values"):
            mean_of(values, intervals)


def test_mean_of_independent_sets_has_the_spread_of_their_means() -> None:
    rng, rates = np.random.default_rng(0), np.array([0.3, 0.6, 0.8])
    means = (rng.binomial(500, rates, (20000, 3)) / 500).mean(axis=1)
    intervals = [mean_interval(np.arange(500) < 500 * rate) for rate in rates]
    assert mean_of(rates.tolist(), intervals)[1] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=2e-3)


def test_effective_robustness() -> None:
    assert effective_robustness(0.5, 0.5, slope=1, intercept=0) == 0
    odds = np.exp(-1.2) * (0.76 / 0.24) ** 0.9
    assert effective_robustness(0.6, 0.76, slope=0.9, intercept=-1.2) == pytest.approx(0.6 - odds / (1 + odds))
    assert effective_robustness(1.0, 0.0, slope=1, intercept=0) == pytest.approx(1 - 1e-6)
    assert effective_robustness(0.0, 1.0, slope=1, intercept=0) == pytest.approx(-1 + 1e-6)


def test_confusion_counts_and_leaves_out_what_could_not_be_read() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, 200), rng.integers(-1, 4, 200)
    matrix = confusion(labels, predictions, 5)
    assert matrix.dtype == np.int64
    for label in range(5):
        for prediction in range(5):
            assert matrix[label, prediction] == ((labels == label) & (predictions == prediction)).sum()
    assert matrix.sum() == 200 - (predictions == -1).sum() < 200
    assert confusion(np.array([0]), np.array([-1]), 2).tolist() == [[0, 0], [0, 0]]
    for label, prediction in [(2, 0), (0, 2), (-1, 0), (0, -2), (2, -1)]:
        with pytest.raises(ValueError, match="none of 2 classes"):
            confusion(np.array([label]), np.array([prediction]), 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: topk_correct(np.zeros((2, 3)), np.zeros(3, int), 1),
        lambda: mean_per_class(np.zeros(0, bool), np.zeros(0, int)),
        lambda: roc_auc(np.zeros(0), np.zeros(0, int)),
        lambda: map_11_point(np.zeros((2, 3)), np.zeros((3, 3), bool)),
        lambda: mean_interval(np.zeros(0, bool)),
        lambda: confusion(np.zeros(0, int), np.zeros(0, int), 2),
    ],
)
def test_empty_and_unequal_arrays_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="one length, and not empty"):
        call()


def test_scores_that_are_partly_nan_and_labels_that_are_no_class_are_refused() -> None:
    scores = np.array([[0.0, np.nan], [np.nan, np.nan]])
    for call in (lambda: topk_correct(scores, np.zeros(2, int), 1), lambda: map_11_point(scores, scores == 0)):
        with pytest.raises(ValueError, match="1 images have NaN for some"):
            call()
    for label, k, problem in [(2, 1, "for 2 classes"), (-1, 1, "for 2 classes"), (0, 0, "k is 0")]:
        with pytest.raises(ValueError, match=problem):
            topk_correct(np.zeros((1, 2)), np.array([label]), k)


def test_a_difference_between_models_is_over_the_same_images() -> None:
    """As Agresti and Min have it, by hand: 3 of 1,000 images are lost, and the interval is not that of 50% of 1,000."""
    before_N = np.arange(1000) % 2 == 0
    after_N = before_N.copy()
    after_N[[0, 2, 4]] = False
    middle, half = -3 / 1002, 1.96 * (4 - 9 / 1002) ** 0.5 / 1002
    assert difference_interval(before_N, after_N) == pytest.approx((middle - half, middle + half), rel=1e-3)
    low, high = difference_interval(before_N, before_N)
    assert -0.002 < low < 0 < high < 0.002
