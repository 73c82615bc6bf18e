"""Strong and mixed views: the trainer makes the pixels that the teacher saw from the numbers in the store alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import Status, StrongViews, ViewPlan
from cache_schemas.views import ONE, Operation
from dimefm.caching.canary import compare_again
from dimefm.caching.encode_shard import encode_shard
from dimefm.errors import MismatchError, TrainingError
from dimefm.images import crops
from dimefm.images.decode import jpeg_size
from dimefm.models.clip import Clip
from dimefm.sources.read_image import ImagePlace
from dimefm.store.embedding_store import Store
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.train import train
from tests.conftest import cached
from tests.images.test_crops import Spy, planned
from tests.making import make_jpeg, read_tar, write_tar
from tests.tiny_training import same, tiny_config, weights

ROWS, VIEWS = 32, 5
CROP = ViewPlan(count=VIEWS, seed=0, crop_scale=(0.4, 1.0), flip=True)
STRONG = replace(CROP, strong=StrongViews())
MIXED = replace(STRONG, mixup=1.0)
KINDS = {
    "strong": (STRONG, None),
    "strong from pixels": (STRONG, 48),
    "mixed": (MIXED, None),
    "mixed from pixels": (MIXED, 48),
    "mixed crops": (replace(CROP, mixup=1.0), None),
}


class Cached:
    """A finished store of views, and the pixels that the teacher saw, (rows, views, 3, H, W)."""

    def __init__(self, source: Path, out: Path, clip: Clip, plan: ViewPlan, side: int | None, rows: int = ROWS) -> None:
        spy: Any = Spy(clip)
        self.store = planned(source, out, clip, side, plan)
        for shard in range(self.store.schema.shards):
            encode_shard(self.store, shard, spy, threads=2)
        self.seen = torch.cat(spy.seen).reshape(rows, plan.count, 3, *clip.identity.preprocessing.size)


def trained_on(store: Store, size: int, rows: int = ROWS, views: int = VIEWS) -> torch.Tensor:
    """All views of all rows as the trainer makes them, (rows, views, 3, size, size)."""
    images = TrainingImages(store.path, Augmentation(size=size, crop_scale=(0.1, 0.2), flip=True, seed=3))
    numbers, found = np.arange(rows), torch.empty((rows, views, 3, size, size), dtype=torch.uint8)
    samples = store.samples(numbers)
    places = None if store.schema.pixels else [ImagePlace(one["file"], one["offset"], one["size"]) for one in samples]
    for epoch in range(views):
        batch = images[Request(0, epoch, numbers, numbers, places)]
        assert isinstance(batch, Batch)
        found[numbers, (numbers + epoch) % views] = batch.pixels_B3HW
    return found


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def source(image_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("views") / "images.tar", read_tar(image_tar, ROWS))


@pytest.fixture(scope="module")
def found(source: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cached]:
    folder = tmp_path_factory.mktemp("stores")
    return {kind: Cached(source, folder / f"{kind}.zarr", clip, *what) for kind, what in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_sees_what_the_teacher_saw_for_every_operation(
    found: dict[str, Cached], clip: Clip, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "draw_view", None)  # it is made from the numbers alone
    one = found[kind]
    size = clip.identity.preprocessing.size[0]
    assert digest(trained_on(one.store, size)) == digest(one.seen)
    if one.store.schema.views and one.store.schema.views.strong:
        drawn = one.store.views(np.arange(ROWS))
        assert set(drawn[..., [5, 7]].ravel().tolist()) == set(Operation)


def test_strong_views_differ_from_crops_and_from_each_other(found: dict[str, Cached], source: Path, clip: Clip) -> None:
    seen = found["strong"].seen.float()
    for a in range(VIEWS):
        for b in range(a):
            assert ((seen[:, a] - seen[:, b]).abs().flatten(1).mean(dim=1) > 1).all()
    assert ((seen - found["mixed crops"].seen).abs().flatten(2).mean(dim=2) > 1).float().mean() > 0.95


def test_a_smaller_student_sees_the_same_strong_view(found: dict[str, Cached], clip: Clip) -> None:
    one, size = found["strong"], clip.identity.preprocessing.size[0]
    small, large = trained_on(one.store, size // 2).float(), one.seen.float()
    pooled = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).view_as(small)
    off = (small - pooled).abs().flatten(2).mean(dim=2)
    assert off.median() < 12
    assert (small.flip(-1) - pooled).abs().mean() > 2 * off.mean()


@pytest.mark.parametrize("kind", ["mixed", "mixed crops"])
def test_a_mixed_view_is_the_mean_of_the_two_by_the_share_that_is_stored(found: dict[str, Cached], kind: str) -> None:
    one = found[kind]
    assert one.store.schema.views
    alone = one.store.schema.views.alone
    views = one.store.views(np.arange(ROWS))
    partner, share = views[..., alone], views[..., alone + 1]
    assert (partner >= 0).mean() > 0.9
    assert (partner // 16 == np.arange(ROWS)[:, None] // 16)[partner >= 0].all()  # of the same shard
    assert (partner != np.arange(ROWS)[:, None]).all()
    assert (share[partner < 0] == ONE).all()
    assert share[partner >= 0].std() > 30
    if kind == "mixed":
        plain, mixed = found["strong"].seen.double(), one.seen.double()
        for row, view in np.argwhere(partner >= 0).tolist():
            own, other = plain[row, view], plain[partner[row, view], view]
            exact = (own * share[row, view] + other * (ONE - share[row, view])) / ONE
            assert (mixed[row, view] - exact).abs().max() <= 0.5
        row, view = np.argwhere(partner >= 0)[0]
        np.testing.assert_array_equal(views[row, view, alone + 2 :], views[partner[row, view], view, :alone])


def test_a_view_whose_partner_cannot_be_read_is_not_mixed_and_says_so(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "1.jpg": b"no image"})
    plan = replace(CROP, count=2, mixup=1.0)
    store = cached("image", tar, tmp_path / "s.zarr", clip, views=plan)
    assert [Status(code).name for code in store.status()] == ["OK", "UNDECODABLE"]
    views = store.views(np.arange(2))
    assert views[0, :, 5].tolist() == [-1, -1]
    assert views[0, :, 6].tolist() == [ONE, ONE]
    assert not views[1].any()
    plain = cached("image", tar, tmp_path / "p.zarr", clip, views=replace(plan, mixup=0.0))
    np.testing.assert_array_equal(store.embeddings(np.array([0])), plain.embeddings(np.array([0])))


@pytest.mark.parametrize("kind", KINDS)
def test_views_encoded_again_are_made_from_their_numbers(found: dict[str, Cached], clip: Clip, kind: str) -> None:
    compared = compare_again(found[kind].store, clip, np.array([0, 7, 20]))
    assert [row for row, _, _ in compared] == [0, 7, 20]
    assert all(cosine > 0.9999 for _, _, cosine in compared)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"strong": None}, "views.augment: strong != crop"),
        ({"strong": StrongViews(magnitude=5)}, "views.magnitude: 9 != 5"),
        ({"strong": StrongViews(operations=3)}, "views.operations: 2 != 3"),
        ({"mixup": 0.2}, "views.mixup: 0.0 != 0.2"),
    ],
)
def test_other_views_are_refused_by_name(
    found: dict[str, Cached], source: Path, clip: Clip, changes: dict[str, Any], difference: str
) -> None:
    with pytest.raises(MismatchError) as caught:
        planned(source, Path(found["strong"].store.path), clip, views=replace(STRONG, **changes))
    assert difference in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


@pytest.mark.parametrize("kind", ["strong", "mixed"])
def test_a_student_is_trained_on_them(found: dict[str, Cached], text_store: Store, tmp_path: Path, kind: str) -> None:
    assert train(tiny_config(found[kind].store, text_store, tmp_path / "run", max_steps=3)).steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("plan", [STRONG, MIXED], ids=["strong", "mixed"])
def test_500_images_of_the_sample_are_replayed_to_the_last_bit(
    sample: Path, clip: Clip, tmp_path: Path, plan: ViewPlan, side: int | None
) -> None:
    rows, plan = 512, replace(plan, count=4)
    tar = write_tar(tmp_path / "images.tar", read_tar(sample / "images" / "train-00000.tar", rows))
    one = Cached(tar, tmp_path / "s.zarr", clip, plan, side, rows)
    size = clip.identity.preprocessing.size[0]
    assert digest(trained_on(one.store, size, rows, 4)) == digest(one.seen)
    assert set(one.store.views(np.arange(rows))[..., [5, 7]].ravel().tolist()) == set(Operation)


# -- in the trainer alone ---------------------------------------------------------------------------------------------


def test_whole_images_may_be_changed_as_strong_views_are(image_tar: Path) -> None:
    """By the operations of views, drawn from seed, epoch and row after the crop, which is that without them."""
    data = next(value for name, value in read_tar(image_tar, 4).items() if name.endswith(".jpg"))
    plain = Augmentation(size=48, crop_scale=(0.3, 1.0), flip=True, seed=5)
    strong = replace(plain, strong=StrongViews())
    changed = 0
    for epoch in range(8):
        view, found = plain(data, epoch, 2), strong(data, epoch, 2)
        assert torch.equal(found, strong(data, epoch, 2))
        rng = _after_crop(np.random.default_rng((5, epoch, 2)), data)
        assert torch.equal(found, crops.with_operations(view, crops.draw_operations(StrongViews(), rng)))
        changed += not torch.equal(view, found)
    assert changed >= 7  # jitter alone changes nearly all


def _after_crop(rng: np.random.Generator, data: bytes) -> np.random.Generator:
    """The generator where a crop and a flip have been drawn from it."""
    size = jpeg_size(data)
    assert size
    crops.random_crop(*size, (0.3, 1.0), rng)
    rng.random()
    return rng


def test_a_run_with_strong_augmentation_goes_on_exactly_and_views_refuse_it(
    image_store: Store, text_store: Store, image_tar: Path, clip: Clip, tmp_path: Path
) -> None:
    whole = tiny_config(image_store, text_store, tmp_path / "whole", augment="strong", max_steps=4)
    plain = replace(whole, out=str(tmp_path / "plain"), augment="crop")
    for config in (whole, plain):
        train(config)
    parts = replace(whole, out=str(tmp_path / "parts"))
    train(replace(parts, max_steps=2))
    with pytest.raises(MismatchError, match="augment: strong != crop"):
        train(replace(parts, augment="crop"))
    train(parts, allow_changes=("max_steps",))
    views = cached("image", image_tar, tmp_path / "views.zarr", clip, views=replace(CROP, count=1))
    with pytest.raises(TrainingError, match=r"augment strong has no effect with .*views.zarr, whose views are shown"):
        train(tiny_config(views, text_store, tmp_path / "refused", augment="strong"))
    assert not same(weights(whole.out), weights(plain.out))
    assert same(weights(whole.out), weights(parts.out))
