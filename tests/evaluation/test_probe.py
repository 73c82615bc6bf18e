"""Linear probes: heads against torch's own modules, the search against ELEVATER's loop, and who sees which labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dimefm.datasets.image_set import ImageSet
from dimefm.errors import SourceError
from dimefm.evaluation import probe as probing
from dimefm.evaluation.features import Features
from dimefm.evaluation.linear_heads import BATCH, FeatureRows, Heads, train_heads
from dimefm.evaluation.probe import DECAYS, FINAL_EPOCHS, RATES, few_shot_rows, probe, validation_part
from tests.stores import random_store

DIM, CLASSES, TRAIN, TEST = 16, 4, 230, 120
LOST = (3, 50)  # images of both splits that could not be read


def centres() -> np.ndarray[Any, Any]:
    return np.random.default_rng(9).standard_normal((CLASSES, DIM))


def split(folder: Path, rows: int, seed: int, noise: float = 2.0) -> tuple[Features, np.ndarray[Any, Any]]:
    """Features about the centre of their class, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    values = centres()[labels] + noise * rng.standard_normal((rows, DIM))
    store, _ = random_store(folder, rows=rows, shard_rows=64, failed=LOST, values=values)
    return Features(store), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("features")
    return (*split(folder / "train.zarr", TRAIN, 1), *split(folder / "test.zarr", TEST, 2))


def images(labels: np.ndarray[Any, Any]) -> ImageSet:
    names = tuple("abcd")
    return ImageSet(
        name="own", split="test", where="w", layout="l", samples=[], files=[], classnames=names, labels=labels
    )


def several(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Labels of which an image may have several."""
    found = np.eye(CLASSES, dtype=bool)[labels]
    found[::3, 0] = True
    return found


START = torch.from_numpy(centres()).float()
SETTINGS = [(0.1, 1e-3), (0.01, 0.1), (1e-4, 1e-6), (0.1, 3.0)]


def by_torch(
    features_ND: torch.Tensor, targets: torch.Tensor, rate: float, decay: float, epochs: int
) -> tuple[nn.Module, nn.Linear]:
    """The same classifier of torch's own modules and optimiser, on the same batches."""
    norm, linear = nn.BatchNorm1d(DIM, affine=False), nn.Linear(DIM, CLASSES)
    linear.weight.data, linear.bias.data = START.clone(), torch.zeros(CLASSES)
    optimiser = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    loss = nn.BCEWithLogitsLoss() if targets.ndim == 2 else nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for places in torch.randperm(len(features_ND), generator=generator).split(BATCH):
            if len(places) > 1:
                optimiser.zero_grad()
                loss(linear(norm(features_ND[places])), targets[places]).backward()
                optimiser.step()
    return norm.eval(), linear


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("rows", [TRAIN, 2 * BATCH + 1])  # of the second, the last batch is a single image
def test_heads_trained_at_once_are_those_that_torch_trains_one_by_one(
    data: tuple[Any, ...], multilabel: bool, rows: int
) -> None:
    train, labels, _, _ = data
    targets = torch.from_numpy(several(labels).astype(np.float32) if multilabel else labels)[:rows]
    taken = FeatureRows(train, np.arange(rows), "cpu")
    rates, decays = map(list, zip(*SETTINGS, strict=True))
    *_, heads = train_heads(taken, targets, START, rates, decays, 3)
    features_ND = torch.from_numpy(train.all())[:rows]
    for place, (rate, decay) in enumerate(SETTINGS):
        norm, linear = by_torch(features_ND, targets, rate, decay, 3)
        torch.testing.assert_close(heads.weight.view(4, CLASSES, DIM)[place], linear.weight.data)
        torch.testing.assert_close(heads.bias.view(4, CLASSES)[place], linear.bias.data)
        torch.testing.assert_close(heads.logits(features_ND)[:, place], linear(norm(features_ND)).detach())


def test_features_that_stay_on_disk_give_the_same_heads(data: tuple[Any, ...]) -> None:
    train, labels, _, _ = data
    rows = np.arange(TRAIN)[::-1].copy()
    found = []
    for limit in (1 << 30, 0):
        taken = FeatureRows(train, rows, "cpu", limit)
        *_, heads = train_heads(taken, torch.from_numpy(labels[rows]), START, [0.1], [1e-3], 2)
        found.append(heads.weight)
        assert torch.equal(torch.cat(list(taken.blocks())), torch.from_numpy(train.take(rows)))
    assert torch.equal(*found)


def test_a_head_that_diverges_leaves_the_others_alone(data: tuple[Any, ...]) -> None:
    train, labels, _, _ = data
    taken, targets = FeatureRows(train, np.arange(TRAIN), "cpu"), torch.from_numpy(labels)
    *_, both = train_heads(taken, targets, START, [0.1, 0.1], [1e6, 1e-3], 10)
    *_, alone = train_heads(taken, targets, START, [0.1], [1e-3], 10)
    weight = both.weight.view(2, CLASSES, DIM)
    assert not torch.isfinite(weight[0]).all()
    torch.testing.assert_close(weight[1], alone.weight)


def elevater_search(score: Any) -> tuple[float, float]:
    """The search as ELEVATER's code words it: a sweep of the weight decay for each learning rate, one run at a time."""
    best = (0.0, 0.0, 0.0)
    for rate in np.logspace(-6, -1, num=6).tolist():
        decays = np.logspace(-6, 6, num=97).tolist()
        coarse = set(np.logspace(-6, 6, num=7))
        peak, top = -1, 0.0
        for place in [i for i, value in enumerate(decays) if value in coarse]:
            if (value := score(rate, decays[place])) > top:
                peak, top = place, value
        span = 8
        while span > 0:
            left, right = max(peak - span, 0), min(peak + span, len(decays) - 1)
            for place in [p for p in (left, right) if p != peak]:
                if (value := score(rate, decays[place])) > top:
                    peak, top = place, value
            span //= 2
        if best[0] < top:
            best = (top, rate, decays[peak])
    return best[1], best[2]


@pytest.mark.parametrize("seed", range(20))
def test_the_search_asks_what_elevaters_asks_and_chooses_the_same(
    data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With made-up scores: rough and with ties for odd seeds, one smooth hill for even ones."""
    train, labels, _, _ = data
    rng = np.random.default_rng(seed)
    rough, hill = rng.integers(0, 6, (6, 97)) / 10, rng.uniform(-6, 6)

    def score(rate: float, decay: float) -> float:
        if seed % 2:
            return float(rough[RATES.index(rate), DECAYS.index(decay)])
        return float(np.exp(-abs(np.log10(decay) - hill) - abs(np.log10(rate) + 2)))

    asked: list[tuple[float, float]] = []

    def scores(self: Any, fit: Any, f: Any, held: Any, check: Any, pairs: list[tuple[float, float]]) -> list[float]:
        asked.extend(pairs)
        return [score(*pair) for pair in pairs]

    monkeypatch.setattr(probing._SgdProbe, "_scores", scores)
    rate, decay, _ = probing._SgdProbe(train, labels, "accuracy", START, "honest").search(np.arange(100), np.arange(9))
    theirs: list[tuple[float, float]] = []
    expected = elevater_search(lambda *pair: theirs.append(pair) or score(*pair))
    assert (rate, decay) == expected
    assert sorted(asked) == sorted(theirs)


def test_the_search_trains_on_one_part_and_scores_on_the_other(data: tuple[Any, ...]) -> None:
    """Against each candidate trained and scored alone."""
    train, labels, _, _ = data
    held = validation_part(labels)
    fit, check = np.flatnonzero(~held), np.flatnonzero(held)
    for selection in ("honest", "elevater"):
        search = probing._SgdProbe(train, labels, "mean_per_class", START, selection)
        pairs = SETTINGS[:3]
        found = search._scores(FeatureRows(train, fit, "cpu"), fit, FeatureRows(train, check, "cpu"), check, pairs)
        for pair, value in zip(pairs, found, strict=True):
            each = []
            for epochs in range(1, 11):
                norm, linear = by_torch(torch.from_numpy(train.take(fit)), torch.from_numpy(labels[fit]), *pair, epochs)
                said = linear(norm(torch.from_numpy(train.take(check)))).argmax(dim=1).numpy()
                right = [(said[labels[check] == c] == c).mean() for c in range(CLASSES)]
                each.append(float(np.mean(right)))
            assert value == pytest.approx(each[-1] if selection == "honest" else max(each))


def run(data: tuple[Any, ...], test_labels: np.ndarray[Any, Any] | None = None, **words: Any) -> Any:
    train, labels, test, known = data
    asked = images(known if test_labels is None else test_labels)
    words = {"metric": "accuracy", "rows": np.arange(TRAIN), "labels": labels, **words}
    metric, rows, labels = (words.pop(name) for name in ("metric", "rows", "labels"))
    return probe(train, labels, rows, test, asked, metric, heads_CD=START, **words)


@pytest.fixture(scope="module")
def honest(data: tuple[Any, ...]) -> Any:
    return run(data)


def test_an_honest_probe_is_blind_to_the_labels_of_test_images(data: tuple[Any, ...], honest: Any) -> None:
    shuffled = run(data, test_labels=np.random.default_rng(3).permutation(data[3]))
    assert shuffled.settings == honest.settings
    np.testing.assert_array_equal(shuffled.scores_NC, honest.scores_NC)
    assert honest.settings["epoch"] == FINAL_EPOCHS
    right = honest.scores_NC.argmax(axis=1) == data[3]
    assert right[~np.isin(np.arange(TEST), LOST)].mean() > 0.6


def test_elevaters_rule_takes_the_best_epoch_on_test_images(data: tuple[Any, ...]) -> None:
    found = run(data, selection="elevater")
    rows = np.setdiff1d(np.arange(TRAIN), LOST)
    readable = np.setdiff1d(np.arange(TEST), LOST)
    settings, targets = found.settings, torch.from_numpy(data[1][rows])
    test_ND = torch.from_numpy(data[2].take(readable))
    trained = train_heads(
        FeatureRows(data[0], rows, "cpu"), targets, START, [settings["learning_rate"]], [settings["weight_decay"]], 50
    )
    right = [
        float((heads.logits(test_ND)[:, 0].argmax(dim=1).numpy() == data[3][readable]).mean()) for heads in trained
    ]
    assert max(right) == pytest.approx((found.scores_NC[readable].argmax(axis=1) == data[3][readable]).mean())
    assert settings["epoch"] == int(np.argmax(right)) + 1


def test_images_that_could_not_be_read_are_neither_trained_on_nor_right(data: tuple[Any, ...], honest: Any) -> None:
    assert honest.settings["unreadable"] == len(LOST)
    lost = np.isnan(honest.scores_NC).all(axis=1)
    assert np.flatnonzero(lost).tolist() == list(LOST)
    assert not np.isnan(honest.scores_NC[~lost]).any()


def test_several_labels_an_image(data: tuple[Any, ...]) -> None:
    found = run(data, labels=several(data[1]), test_labels=several(data[3]), metric="map_11_point")
    scores_NC = np.nan_to_num(found.scores_NC)
    assert ((scores_NC >= 0) & (scores_NC <= 1)).all()  # as a submission wants them
    assert scores_NC[several(data[3])].mean() > scores_NC[~several(data[3])].mean() + 0.1


def test_lbfgs_is_scikit_learns_with_the_strength_that_validates_best(data: tuple[Any, ...]) -> None:
    train, labels, test, _ = data
    found = run(data, solver="lbfgs")
    rows = np.setdiff1d(np.arange(TRAIN), LOST)
    both = LogisticRegression(C=1 / found.settings["l2"], max_iter=1000).fit(train.take(rows), labels[rows])
    readable = np.setdiff1d(np.arange(TEST), LOST)
    np.testing.assert_allclose(found.scores_NC[readable], both.predict_proba(test.take(readable)), atol=1e-4)
    held = validation_part(labels[rows])
    fit, check = rows[~held], rows[held]
    coarse = [
        LogisticRegression(C=1 / decay, max_iter=1000)
        .fit(train.take(fit), labels[fit])
        .score(train.take(check), labels[check])
        for decay in DECAYS[::16]
    ]
    assert found.settings["validation"] >= max(coarse)


@pytest.mark.parametrize(("shots", "expected"), [(1, 1), (5, 5), (1000, 1000)])
def test_a_subset_has_so_many_images_of_each_class_or_all(shots: int, expected: int) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 300)
    rows = few_shot_rows(labels, shots, 0)
    counts = np.bincount(labels[rows], minlength=7)
    assert counts.tolist() == np.minimum(np.bincount(labels), expected).tolist()
    assert np.array_equal(rows, few_shot_rows(labels, shots, 0))
    assert shots == 1000 or not np.array_equal(rows, few_shot_rows(labels, shots, 1))


def test_a_subset_of_several_labels_has_enough_of_each_class() -> None:
    labels = several(np.random.default_rng(0).integers(0, CLASSES, 300))
    rows = few_shot_rows(labels, 5, 0)
    assert (labels[rows].sum(axis=0) >= 5).all()
    assert len(rows) <= 5 * CLASSES


def test_validation_images_are_the_first_fifth_of_each_class_rounded_up() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
    assert np.flatnonzero(validation_part(labels)).tolist() == [0, 1, 6, 8]


def test_validation_images_of_several_labels_cover_a_fifth_of_each_class() -> None:
    labels = several(np.random.default_rng(0).integers(0, CLASSES, 300))
    held = validation_part(labels)
    assert (labels[held].sum(axis=0) >= np.ceil(labels.sum(axis=0) / 5)).all()
    assert held.mean() < 0.3


def test_too_few_training_images_are_refused(data: tuple[Any, ...]) -> None:
    with pytest.raises(SourceError, match="1 training images are too few"):
        run(data, rows=np.array([7]))


def test_with_few_validation_images_the_search_trains_as_long_as_the_final_probe() -> None:
    """Else a classifier is chosen that is good after a handful of steps and gone after the rest: measured on
    Caltech-101 (15 classes of 3 images), one with all validation images right had 5% of the test images right."""
    few, many = np.repeat(np.arange(5), 100), np.repeat(np.arange(5), 105)
    assert probing.search_epochs(few, "honest", "sgd") == FINAL_EPOCHS
    assert probing.search_epochs(many, "honest", "sgd") == probing.SEARCH_EPOCHS
    assert probing.search_epochs(few, "elevater", "sgd") == probing.SEARCH_EPOCHS, "published results are of these"
    assert probing.search_epochs(few, "honest", "lbfgs") == probing.SEARCH_EPOCHS


def test_a_choice_by_few_validation_images_is_noted(data: tuple[Any, ...]) -> None:
    found = run(data, rows=few_shot_rows(data[1], 5, 0), epochs=FINAL_EPOCHS)
    count = found.settings["validation_images"]
    assert count == CLASSES
    (note,) = probing.note_on_few(found.settings, "accuracy")
    assert note.startswith(f"the settings of the probe were chosen by {count} validation images (")
    assert "% were right, interval [" in note
    assert "too few to tell good settings from bad ones" in note
    assert "right" not in probing.note_on_few(found.settings, "map_11_point")[0]
    assert probing.note_on_few({"validation_images": 101, "validation": 0.5}, "accuracy") == []


def test_a_search_in_which_nothing_is_right_keeps_the_least_change() -> None:
    walk = probing._Walk(len(DECAYS))
    while walk.places:
        walk.step([0.0 for _ in walk.places])
    assert walk.best == 0


def test_final_scores_of_a_probe_that_diverges_are_no_numbers_of_right_answers(
    data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> Any:
        for _ in range(FINAL_EPOCHS):
            weight = torch.full((CLASSES, DIM), torch.nan)
            yield Heads(weight, torch.zeros(CLASSES), torch.zeros(DIM), torch.ones(DIM), 1)

    search = probing._SgdProbe(data[0], data[1], "accuracy", START, "honest")
    monkeypatch.setattr(probing, "train_heads", diverging)
    scores_NC, _ = search.train_final(np.arange(TRAIN), 0.1, 1e-3, data[2], data[3])
    assert (scores_NC == 0).all()


def test_validation_holds_no_more_scores_than_a_block_has(
    data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 24 scores for each of 4 classifiers and 4 classes: one image at a time, with the same result."""
    train, labels, _, _ = data
    search = probing._SgdProbe(train, labels, "accuracy", START, "honest")
    rows = np.arange(TRAIN)
    rates, decays = map(list, zip(*SETTINGS, strict=True))
    *_, heads = train_heads(FeatureRows(train, rows, "cpu"), torch.from_numpy(labels), START, rates, decays, 1)
    whole = search._score_heads(heads, FeatureRows(train, rows, "cpu"), labels)
    sizes: list[int] = []
    real = Heads.logits
    monkeypatch.setattr("dimefm.evaluation.linear_heads._SCORES", 24)
    monkeypatch.setattr(Heads, "logits", lambda self, x: sizes.append(len(x)) or real(self, x))
    np.testing.assert_array_equal(search._score_heads(heads, FeatureRows(train, rows, "cpu"), labels), whole)
    assert set(sizes) == {1}
    said = real(heads, torch.from_numpy(train.all())).argmax(dim=2).numpy()
    np.testing.assert_allclose(whole, (said == labels[:, None]).mean(axis=0))


def test_a_classifier_that_diverged_scores_nothing(data: tuple[Any, ...]) -> None:
    train, labels, _, _ = data
    search = probing._SgdProbe(train, labels, "accuracy", START, "honest")
    pairs = [(0.1, 1e6), (0.1, 1e-3)]
    rows, held = np.arange(100), np.arange(100, TRAIN)
    found = search._scores(FeatureRows(train, rows, "cpu"), rows, FeatureRows(train, held, "cpu"), held, pairs)
    assert found[0] == 0.0
    assert found[1] > 0.5


def test_lbfgs_cannot_be_test_selected(data: tuple[Any, ...]) -> None:
    with pytest.raises(SourceError, match="lbfgs has none"):
        run(data, solver="lbfgs", selection="elevater")


SOLVERS: list[dict[str, Any]] = [{"solver": "lbfgs"}, {"solver": "sgd"}, {"solver": "sgd", "selection": "elevater"}]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search asks for few candidates."""
    monkeypatch.setattr(probing, "RATES", [0.1])
    monkeypatch.setattr(probing, "DECAYS", np.logspace(-4, 0, 3).tolist())


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("solver", SOLVERS, ids=["lbfgs", "honest", "elevater"])
@pytest.mark.parametrize(("metric", "missing"), [
    ("accuracy", 0), ("mean_per_class", CLASSES - 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("accuracy", CLASSES - 1), ("mean_per_class", 0)]),
])  # fmt: skip
def test_a_class_without_a_training_image_is_wrong_and_the_others_right(
    data: tuple[Any, ...], solver: dict[str, Any], metric: str, missing: int
) -> None:
    rows = np.flatnonzero(data[1] != missing)
    labels = np.where(data[1] == missing, 1, data[1])  # nothing in the split says that there is such a class
    found = run(data, rows=rows, labels=labels, metric=metric, **solver)
    assert found.scores_NC.shape == (TEST, CLASSES)
    readable = data[2].readable
    said, known = found.scores_NC[readable].argmax(axis=1), data[3][readable]
    if solver.get("selection") != "elevater":  # which may stay with the text heads that it begins with
        assert (said[known == missing] != missing).mean() > 0.9
    assert (said[known != missing] == known[known != missing]).mean() > 0.6


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("solver", SOLVERS, ids=["lbfgs", "honest", "elevater"])
def test_a_class_of_one_image_is_validated_on_it(data: tuple[Any, ...], solver: dict[str, Any]) -> None:
    """And where only one other class is left, there is nothing to tell apart in the search."""
    alone = int(np.flatnonzero(data[1] == 3)[-1])
    for others in ([0, 1, 2], [1]):
        rows = np.sort(np.append(np.flatnonzero(np.isin(data[1], others)), alone))
        found = run(data, rows=rows, **solver)
        readable = data[2].readable
        known = data[3][readable]
        of_others = np.isin(known, others)
        right = found.scores_NC[readable].argmax(axis=1)[of_others] == known[of_others]
        assert right.mean() > 0.6


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=["lbfgs", "honest"])
def test_where_there_is_one_class_alone_it_is_what_is_said(data: tuple[Any, ...], solver: dict[str, Any]) -> None:
    found = run(data, rows=np.flatnonzero(data[1] == 1), **solver)
    readable = data[2].readable
    said, known = found.scores_NC[readable].argmax(axis=1), data[3][readable]
    assert (said[known == 1] == 1).all()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=["lbfgs", "honest"])
def test_of_several_labels_one_may_be_missing_and_another_everywhere(
    data: tuple[Any, ...], solver: dict[str, Any]
) -> None:
    labels, known = np.eye(CLASSES, dtype=bool)[data[1]], np.eye(CLASSES, dtype=bool)[data[3]]
    labels[:, 2], labels[:, 1], known[:, 1] = False, True, True
    found = run(data, labels=labels, test_labels=known, metric="map_11_point", **solver)
    scores_NC = found.scores_NC[data[2].readable]
    assert scores_NC.shape[1] == CLASSES
    assert (scores_NC[:, 1] > scores_NC[:, 2]).all()
