"""Training from stores at URLs through a cache on the disk: the same student, and nothing asked for twice."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dimefm.errors import TrainingError
from dimefm.store.embedding_store import Store
from dimefm.store.local_copy import bring
from dimefm.system.cache_room import Room
from dimefm.system.file_cache import caching_in
from dimefm.training import fetch_ahead, text_bank
from dimefm.training.fetch_ahead import fetching_ahead
from dimefm.training.row_order import Order
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import upload
from tests.stores import random_store
from tests.tiny_training import same, tiny_config, weights

if TYPE_CHECKING:
    from dimefm.models.clip import Clip
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of this machine is."""
    monkeypatch.setattr(Room, "_kept_free", lambda self: 0)


def test_a_student_from_s3_is_that_of_local_stores_and_a_second_run_asks_for_no_data(
    image_store: Store, text_store: Store, tmp_path: Path, s3: str, s3_requests: S3Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(text_bank, "_room_in_memory", lambda: 0)  # sentences are read at every step
    config = tiny_config(image_store, text_store, tmp_path / "local", max_steps=4)
    train(config)
    images, texts = upload(Path(image_store.path), f"{s3}/i.zarr"), upload(Path(text_store.path), f"{s3}/t.zarr")
    for name in ("first", "second"):
        s3_requests.clear()
        there = tiny_config(
            Store(images), Store(texts), tmp_path / name, max_steps=4, cache_dir=str(tmp_path / "cache")
        )
        train(there)
        assert same(weights(tmp_path / "local"), weights(tmp_path / name))
    assert not s3_requests.of("GET", "/embedding/c/")


@pytest.mark.slow
def test_a_student_of_two_stores_of_which_one_is_at_a_url_is_that_of_local_ones(
    image_store: Store, text_store: Store, image_tar: Path, clip: Clip, tmp_path: Path, s3: str,
    s3_requests: S3Requests,
) -> None:  # fmt: skip
    other = cached("image", image_tar, tmp_path / "o.zarr", clip, shard_rows=48, pixels=64)
    first = cached("image", image_tar, tmp_path / "f.zarr", clip, pixels=64)
    far = upload(Path(other.path), f"{s3}/o.zarr")
    for name, where in (("local", other.path), ("first", far), ("second", far)):
        s3_requests.clear()
        config = tiny_config(image_store, text_store, tmp_path / name, max_steps=4, cache_dir=str(tmp_path / "cache"))
        train(replace(config, images=f"{first.path}::{where}", image_weights=(1.0, 3.0)))
        assert same(weights(tmp_path / "local"), weights(tmp_path / name))
    assert not s3_requests.of("GET", "/embedding/c/")
    assert not s3_requests.of("GET", "/pixels/")


@pytest.mark.slow
def test_a_process_fetches_two_windows_ahead_and_then_waits(
    tmp_path: Path, s3: str, s3_requests: S3Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.training.row_order.CHUNKS_WINDOW_ROWS", 32)
    monkeypatch.setattr(fetch_ahead, "_LOOK_EVERY", 0.01)
    for name in ("i.zarr", "other.zarr"):
        random_store(tmp_path / name, rows=256, shard_rows=16)
    store, other = (Store(upload(tmp_path / name, f"{s3}/{name}")) for name in ("i.zarr", "other.zarr"))

    def fetched(store: str = "i.zarr") -> int:
        return len({path for _, path, *_ in s3_requests.of("GET", f"{store}/embedding/c/")})

    def wait_for(shards: int, store: str = "i.zarr") -> int:
        deadline = time.monotonic() + 60
        while fetched(store) < shards and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        return fetched(store)

    with caching_in(str(tmp_path / "cache")):
        order = Order(store=Store(store.path), seed=0, batch_size=16, kind="chunks")
        with fetching_ahead([order], [other], 0, 16) as position:
            assert position is not None
            assert wait_for(6) == 6  # of two chunks each: those of the window that comes first, and two more
            position[0] = 2
            assert wait_for(8) == 8
            position[0] = 15
            assert wait_for(16) == 16
            assert wait_for(15, "other.zarr") >= 15  # of another teacher, for the same rows
        rows_N = np.arange(256)
        s3_requests.clear()
        Store(store.path).gather(rows_N)
        assert fetched() <= 2  # of those that it was about to write when it was ended


def test_sentences_are_brought_where_half_of_the_cache_holds_them(
    tmp_path: Path, s3: str, s3_requests: S3Requests
) -> None:
    _, embedding_ND = random_store(tmp_path / "t.zarr", rows=256, shard_rows=64, kind="text")
    url = upload(tmp_path / "t.zarr", f"{s3}/t.zarr")
    size = embedding_ND.nbytes
    with caching_in(str(tmp_path / "small"), 2 * size - 1):
        assert not bring(Store(url))
    with caching_in(str(tmp_path / "large"), 10 * size):
        assert bring(Store(url))
        s3_requests.clear()
        rows_N = np.array([3, 200, 77])
        np.testing.assert_array_equal(Store(url).gather(rows_N), embedding_ND[rows_N])
        assert not s3_requests.of("GET", "/embedding/c/")
    assert not bring(Store(url))


def test_a_size_without_a_folder_is_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cache_size has no effect without cache_dir"):
        tiny_config(image_store, text_store, tmp_path / "run", cache_size=1000)
