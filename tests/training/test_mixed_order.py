"""Rows drawn from several stores, and runs on several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm.errors import MismatchError, TrainingError
from dimefm.export.check_material import images_of_run
from dimefm.export.origin import origin_of
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.store.joined_store import JoinedStore
from dimefm.training import mixed_order, row_order
from dimefm.training.batch_loader import Requests
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig
from dimefm.training.mean_embedding import mean_embedding
from dimefm.training.mixed_order import MixedOrder, order_of
from dimefm.training.row_order import Order
from dimefm.training.run_folder import read_run
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import read_tar, write_tar
from tests.stores import random_store
from tests.tiny_training import same, tiny_config, weights
from tests.training.test_train import interrupted_at

A, B = 60, 100
BATCH = 8
Joined = Callable[..., JoinedStore]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """Joins stores of 58 and 99 rows with an embedding, with weights."""
    folder = tmp_path_factory.mktemp("stores")
    one, _ = random_store(folder / "a.zarr", rows=A, shard_rows=32, failed=(0, 7), digest="a")
    other, _ = random_store(folder / "b.zarr", rows=B, shard_rows=32, failed=(99,), digest="b", seed=1)
    return lambda *weights: JoinedStore([one, other], weights)


@pytest.fixture(params=["blocks", "chunks"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both orders, their windows small."""
    monkeypatch.setattr(row_order, "CHUNKS_WINDOW_ROWS", 32)
    for module in (row_order, mixed_order):
        monkeypatch.setattr(module, "WINDOW_ROWS", 32)
        monkeypatch.setattr(module, "WINDOW_BATCHES", 2)
    return request.param


def order(store: Store, kind: Any = "blocks", **changes: Any) -> Order:
    return order_of(store, **{"seed": 0, "batch_size": BATCH, "kind": kind, **changes})


def steps(found: Order, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and passes of steps, (S, G)."""
    windows = list(found.windows_in_passes(first, stop))
    return np.concatenate([rows for *_, rows, _ in windows]), np.concatenate([passes for *_, passes in windows])


def test_one_store_has_the_order_that_it_always_had(joined: Joined) -> None:
    store = joined().parts[0]
    assert order(store) == Order(store=store, seed=0, batch_size=BATCH, kind="blocks")


@pytest.mark.parametrize("weights", [(), (1.0, 2.0), (3.0, 0.5)])
def test_a_row_is_shown_as_often_as_its_weight_says(joined: Joined, kind: Any, weights: tuple[float, ...]) -> None:
    """And each time in the next pass over its store, so that no crop of it is shown twice."""
    found = order(joined(*weights), kind)
    one, other = weights or (1, 1)
    assert found.rows == int(58 * one + 99 * other)
    assert found.steps_per_epoch == found.rows // BATCH
    epochs = 6
    rows_SG, passes_SG = steps(found, 0, epochs * found.steps_per_epoch)
    shown = Counter(rows_SG.ravel().tolist())
    assert not {0, 7, A + 99} & shown.keys()
    for rows, weight in ((range(A), one), (range(A, A + B), other)):
        counts = [shown[row] for row in rows if row not in (0, 7, A + 99)]
        assert epochs * weight * 0.97 - 1 <= min(counts)  # but for incomplete batches
        assert max(counts) <= np.ceil(epochs * weight)
        assert max(counts) - min(counts) <= 1
    seen = Counter[int]()
    for rows_G, passes_G in zip(rows_SG.tolist(), passes_SG.tolist(), strict=True):
        for row, number in sorted(zip(rows_G, passes_G, strict=True)):  # a batch may have the end of one pass and more
            assert number == seen[row]
            seen[row] += 1
    of_one = (rows_SG < A).sum(axis=1)
    share = BATCH * 58 * one / (58 * one + 99 * other)
    assert abs(of_one - share).max() <= 1, "a batch has more or less than its share"
    changes = np.diff((rows_SG < A).astype(int), axis=1) != 0
    assert (changes.sum(axis=1) <= 1).mean() < 0.4, "rows of a batch stand by store"


@pytest.mark.parametrize("first", [1, 5, 17, 40])
def test_any_step_can_be_gone_to(joined: Joined, kind: Any, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = joined(1.0, 1.5)
    found = order(store, kind)
    assert found.steps_per_epoch == 25
    rows_SG, passes_SG = steps(found, 0, 60)
    there_SG, passes_there_SG = steps(found, first, 60)
    np.testing.assert_array_equal(there_SG, rows_SG[first:])
    np.testing.assert_array_equal(passes_there_SG, passes_SG[first:])
    assert [step // 25 for step, *_ in found.windows(first, 60)] == [epoch for _, epoch, _ in found.windows(first, 60)]
    assert [rows.tolist() for *_, rows in found.steps(first, 60)] == there_SG.tolist()
    assert not np.array_equal(steps(order(store, kind, seed=1), 0, 60)[0], rows_SG)


def test_processes_have_their_rows_with_the_passes(joined: Joined) -> None:
    found = order(joined(1.0, 2.0))
    rows_SG, passes_SG = steps(found, 30, 40)
    for rank in range(2):
        requests = list(Requests(found, first=30, steps=40, rank=rank, world=2))
        assert [request.rows_B.tolist() for request in requests] == rows_SG[:, rank::2].tolist()
        assert [request.passes().tolist() for request in requests] == passes_SG[:, rank::2].tolist()
    (request,) = Requests(order(found.store.parts[0]), first=8, steps=9)
    assert request.passes().tolist() == [1] * BATCH


def test_a_batch_has_room_for_all_stores(joined: Joined) -> None:
    with pytest.raises(TrainingError, match=r"a batch of 3 is too small for 2 image stores\n.*4 at least"):
        order(joined(), batch_size=3)
    tiny = steps(order(joined(1.0, 0.001), batch_size=4), 0, 4000)[0]
    assert 15 < (tiny >= A).sum() < 40, "a store whose share of a batch is less than a row is left out"


def test_the_mean_is_that_of_what_is_drawn(joined: Joined) -> None:
    store = joined(1.0, 3.0)
    assert isinstance(order(store), MixedOrder)
    rows = np.concatenate([np.arange(A), *[np.arange(A, A + B)] * 3])
    drawn = torch.from_numpy(store.gather(rows)).double()
    torch.testing.assert_close(mean_embedding(store), drawn[drawn.any(dim=1)].mean(dim=0).float())


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(image_tar: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two stores of 64 and 32 real images, as --images takes them."""
    folder = tmp_path_factory.mktemp("two")
    members = list(read_tar(image_tar, 96).items())
    tars = [write_tar(folder / f"{name}.tar", dict(part)) for name, part in (("a", members[:64]), ("b", members[64:]))]
    return "::".join(cached("image", tar, folder / f"{tar.stem}.zarr", clip).path for tar in tars)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_two_stores_goes_on_exactly(
    two: str, image_store: Store, text_store: Store, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"images": two, "image_weights": (1.0, 2.0), "checkpoint_every": 1, "epochs": 1,
                             "max_steps": None, "loss": LossConfig(vl=0.7, pvl=0.3, centred=0.5)}  # fmt: skip
    whole = replace(tiny_config(image_store, text_store, tmp_path / "whole"), **words)
    train(whole)
    assert read_run(whole.out).steps == 8
    cut = replace(whole, out=str(tmp_path / "cut"), workers=workers)
    monkeypatch.setattr(Checkpoints, "save", interrupted_at(5))
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    with pytest.raises(MismatchError, match=r"image_weights: \[1.0, 2.0\] != \[\]"):
        train(replace(cut, image_weights=()))
    turned = "::".join(reversed(two.split("::")))
    with pytest.raises(MismatchError, match="images_identity"):
        train(replace(cut, images=turned))
    train(cut)
    assert same(weights(whole.out), weights(cut.out))
    images = origin_of(whole.out, 8, "model", read_run(whole.out).teacher).sources[0]
    assert (images.store, images.names, images.rows) == ("a.zarr::b.zarr", ("a.tar", "b.tar"), 96)
    assert len(images_of_run(whole.out, 5)) == 5
    train(replace(cut, image_weights=(1.0, 3.0)), allow_changes=("image_weights",))
    assert [change.field for change in read_run(cut.out).changes] == ["image_weights", "steps"]


def test_what_goes_with_one_store_alone_is_refused(two: str, image_store: Store, text_store: Store) -> None:
    config = tiny_config(image_store, text_store, Path("o"))
    for changes, what in (
        ({"image_weights": (2.0,)}, "image_weights have no effect with one image store"),
        ({"images": two, "image_weights": (2.0,)}, "image_weights are one for each image store: 1 for 2"),
        ({"images": two, "image_weights": (1.0, 0.0)}, "image_weights must be above 0"),
        ({"images": two, "pairs": "p", "loss": LossConfig(contrastive=1)}, "pairs are of one image store"),
        ({"images": two, "captions": "c", "loss": LossConfig(contrastive=1)}, "captions are of one image store"),
    ):
        with pytest.raises(TrainingError, match=what):
            replace(config, **changes)  # type: ignore[arg-type]
