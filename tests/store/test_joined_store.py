"""Several stores that are read as one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import Status, ViewPlan
from dimefm.errors import AbsentError, MismatchError, StoreError
from dimefm.models.clip import Clip
from dimefm.sources.read_image import ImagePlace
from dimefm.store.embedding_store import Store, opened
from dimefm.store.joined_store import JoinedStore, open_images
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from tests.conftest import cached
from tests.making import read_tar, write_tar
from tests.stores import random_store

FIRST, SECOND = 20, 37
VIEWS = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
Two = tuple[Store, np.ndarray, np.ndarray]


@pytest.fixture
def two(tmp_path: Path) -> Two:
    """Two stores as one, and the embeddings of each."""
    first, one = random_store(tmp_path / "a.zarr", rows=FIRST, shard_rows=16, failed=(3,), seed=1, digest="a")
    second, other = random_store(tmp_path / "b.zarr", rows=SECOND, shard_rows=32, failed=(0, 36), seed=2, digest="b")
    return open_images(f"{first.path}::{second.path}"), one, other


def test_rows_of_the_second_follow_those_of_the_first(two: Two) -> None:
    joined, one, other = two
    values = np.concatenate([one, other])
    assert joined.schema.rows == FIRST + SECOND
    for start, stop in ((0, FIRST + SECOND), (5, 9), (18, 23), (FIRST, 40), (7, 7)):
        np.testing.assert_array_equal(joined.read(start, stop), values[start:stop])
    rows = np.array([56, 3, 21, 0, 21, 19])
    np.testing.assert_array_equal(joined.gather(rows), values[rows])
    np.testing.assert_array_equal(joined.embeddings(rows), values[rows])
    np.testing.assert_array_equal(joined.gather(rows[:0]), values[:0])
    assert np.flatnonzero(joined.status() != Status.OK).tolist() == [3, FIRST, FIRST + 36]
    assert joined.contents.good == FIRST + SECOND - 3
    assert [one["key"] for one in joined.samples(rows)] == ["k36", "k3", "k1", "k0", "k1", "k19"]
    assert joined.name_of(21) == f"row 1 of {joined.parts[1].path}"
    assert joined.parts[0].name_of(1) == "row 1"


def test_it_is_known_by_its_parts_and_opened_again(two: Two) -> None:
    joined, *_ = two
    assert isinstance(joined, JoinedStore)
    first, second = (store.path for store in joined.parts)
    turned = open_images(f"{second}::{first}", (2.0, 1.0))
    assert isinstance(turned, JoinedStore)
    assert turned.schema.identity != joined.schema.identity
    assert turned.contents.digest != joined.contents.digest
    np.testing.assert_allclose(turned.shares, [70 / 89, 19 / 89])
    for again in (opened(turned), pickle.loads(pickle.dumps(turned))):
        assert isinstance(again, JoinedStore)
        assert (again.path, again.weights, again.schema) == (turned.path, turned.weights, turned.schema)
        assert again.parts[0] is not turned.parts[0]
        np.testing.assert_array_equal(again.read(0, 57), turned.read(0, 57))
    assert type(open_images(first)) is Store
    assert open_images(first).parts[0].path == first


def test_stores_that_are_not_alike_are_refused_by_what_differs(two: Two, tmp_path: Path) -> None:
    path = two[0].parts[0].path
    random_store(tmp_path / "other.zarr", rows=8, shard_rows=8, weights="others")
    random_store(tmp_path / "wide.zarr", rows=8, shard_rows=8, dtype="float32")
    for other, what in (
        (str(tmp_path / "other.zarr"), "come from different teachers:\n  - teacher.weights: w != others"),
        (str(tmp_path / "wide.zarr"), "cannot be trained on together: dtype: float16 != float32"),
        (path, "is named twice\n  remedy: name it once, with a weight: --image-weights"),
    ):
        with pytest.raises(MismatchError, match=what):
            open_images(f"{path}::{other}")
    with pytest.raises(StoreError, match="nowhere"):
        open_images(f"{path}::{tmp_path / 'nowhere.zarr'}")
    for typed in (f"{path}::", f"::{path}"):  # no folder is the one that the command runs in
        with pytest.raises(AbsentError, match="has no store on one side of ::"):
            open_images(typed)


@pytest.fixture(scope="module")
def halves(image_tar: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Store]]:
    """Makes stores of the first 16 images and of 8 others."""

    def make(**changes: Any) -> list[Store]:
        folder = tmp_path_factory.mktemp("halves")
        members = list(read_tar(image_tar, 24).items())
        tars = [
            write_tar(folder / f"{name}.tar", dict(part)) for name, part in (("a", members[:16]), ("b", members[16:]))
        ]
        return [cached("image", tar, folder / f"{tar.stem}.zarr", clip, **changes) for tar in tars]

    return make


@pytest.mark.parametrize("pixels", [None, 48])
@pytest.mark.parametrize("views", [None, VIEWS, replace(VIEWS, mixup=1.0)])
def test_images_of_a_joined_store_are_those_of_its_parts(
    halves: Callable[..., list[Store]], pixels: int | None, views: ViewPlan | None
) -> None:
    stores = halves(views=views, pixels=pixels)
    augmentation = Augmentation(size=32, crop_scale=(0.3, 1.0), flip=True, seed=0)

    def batch(store: Store, rows: list[int], passes: list[int]) -> Batch:
        rows_B = np.array(rows)
        found = store.samples(rows_B, ImagePlace._fields)
        places = None if pixels else [ImagePlace(**{name: one[name] for name in ImagePlace._fields}) for one in found]
        item = TrainingImages(store, augmentation)[Request(0, 9, rows_B, rows_B, places, None, np.array(passes))]
        assert isinstance(item, Batch)
        return item

    joined = batch(JoinedStore(stores), [17, 2, 23, 5], [1, 0, 3, 4])
    first, second = batch(stores[0], [2, 5], [0, 4]), batch(stores[1], [1, 7], [1, 3])
    assert torch.equal(joined.teacher_BD, torch.stack([second.teacher_BD[0], first.teacher_BD[0], second.teacher_BD[1],
                                                       first.teacher_BD[1]]))  # fmt: skip
    assert torch.equal(joined.pixels_B3HW[1::2], first.pixels_B3HW)
    if views:  # else crops are drawn for the rows, which have other numbers here
        assert torch.equal(joined.pixels_B3HW[::2], second.pixels_B3HW)


def test_views_and_pixels_must_be_those_of_all(halves: Callable[..., list[Store]]) -> None:
    plain, kept = halves()[0], halves(pixels=48)[1]
    with pytest.raises(MismatchError, match="pixels: False != True"):
        JoinedStore([plain, kept])
    two = [halves(views=replace(VIEWS, count=count))[count - 1] for count in (1, 2)]
    with pytest.raises(MismatchError, match="cannot be trained on together: views: 1 != 2\n"):
        JoinedStore(two)
    with pytest.raises(MismatchError, match="cannot be trained on together: views: None != 2\n"):
        JoinedStore([plain, two[1]])
