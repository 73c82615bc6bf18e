"""What a run reads begins before anything on a device does, is made ahead of time, and ends with the run."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from dimefm.errors import MismatchError, TrainingError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.training import batch_loader, build_towers
from dimefm.training import train as train_module
from dimefm.training.batch_loader import THREAD, Requests, take_ahead
from dimefm.training.distributed import Place
from dimefm.training.feed import open_feed
from dimefm.training.image_batches import Batch
from dimefm.training.row_order import Order
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import make_jpeg, write_parquet
from tests.tiny_training import tiny_config

ALONE = Place(0, 1, torch.device("cpu"))


@pytest.fixture
def small_clip(tmp_path: Path) -> str:
    """An open_clip model whose text tower is tiny, known by name."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "fed-clip.json").write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "fed-clip.json")
    return "fed-clip"


@pytest.mark.parametrize("both", [False, True], ids=["images", "images and sentences"])
def test_readers_are_at_work_before_the_group_and_the_models_and_gone_after(
    image_store: Store, text_store: Store, tmp_path: Path, small_clip: str, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = [], set(multiprocessing.active_children())

    def spied(module: ModuleType, name: str) -> Any:
        original = getattr(module, name)

        def spy(*args: Any) -> Any:
            readers = set(multiprocessing.active_children()) - before
            seen.append((name, len(readers), all(reader.is_alive() for reader in readers)))
            return original(*args)

        return spy

    for module, name in ((train_module, "join_group"), (build_towers, "build_student")):
        monkeypatch.setattr(module, name, spied(module, name))
    config = tiny_config(image_store, text_store, tmp_path / "run", workers=2, max_steps=2)
    if both:
        config = replace(config, student=small_clip, text_student=small_clip, text_batch_size=16)
    train(config)
    assert seen == [("join_group", 2 + both, True), ("build_student", 2 + both, True)]
    assert set(multiprocessing.active_children()) == before


def test_no_thread_that_reads_is_at_work_when_a_process_is_forked(
    image_store: Store, text_store: Store, tmp_path: Path, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that it holds at this moment would stay locked in the process for ever."""
    start, threads = multiprocessing.process.BaseProcess.start, []

    def starting(self: Any) -> None:
        threads.append([thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)])
        start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", starting)
    config = tiny_config(image_store, text_store, tmp_path / "run", workers=2, student=small_clip)
    with open_feed(replace(config, text_student=small_clip, text_batch_size=16), ALONE):
        assert threads == [[], [], []]
        assert any(thread.name.startswith(THREAD) for thread in threading.enumerate())


@pytest.mark.parametrize("where", ["join_group", "build_student", "TowerTrainer", "mismatch", "second loader"])
def test_no_reader_is_left_by_an_error(
    image_store: Store, text_store: Store, tmp_path: Path, small_clip: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())
    config = tiny_config(image_store, text_store, tmp_path / "run", workers=2, max_steps=2)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TrainingError("broken on purpose")

    if where == "mismatch":
        train(config)
        with pytest.raises(MismatchError, match="lr: "):
            train(replace(config, lr=1.0, max_steps=4), allow_changes=("max_steps",))
    else:
        if where == "second loader":  # that of the sentences has begun by then
            config = replace(config, student=small_clip, text_student=small_clip, text_batch_size=16)
            monkeypatch.setattr("dimefm.training.feed.TrainingImages", broken)
        else:
            monkeypatch.setattr(train_module if where == "join_group" else build_towers, where, broken)
        with pytest.raises(TrainingError, match="broken on purpose"):
            train(config)
    assert set(multiprocessing.active_children()) == before
    monkeypatch.undo()
    train(replace(config, out=str(tmp_path / "another")))


def test_a_finished_run_starts_no_reader(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=2)
    train(config)
    with open_feed(replace(config, workers=2), ALONE) as feed:
        assert (feed.first_step, feed.steps) == (2, 2)
        assert not multiprocessing.active_children()
        assert list(feed.batches) == []


def test_batches_for_a_gpu_are_page_locked_in_a_thread_that_begins_with_the_first(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a machine without a GPU shows it: the GPU is in use only once the first batch is asked for."""
    begun, locked = [], []

    def lock(self: Batch) -> Batch:
        locked.append((self.step, threading.get_ident()))
        return self

    monkeypatch.setattr("dimefm.training.text_bank._room_on", lambda device: 0)
    monkeypatch.setattr(
        "dimefm.training.feed._begin_page_locking", lambda device: begun.append((device, threading.get_ident()))
    )
    monkeypatch.setattr(Batch, "pin_memory", lock)
    place = Place(0, 1, torch.device("cuda:3"))
    with open_feed(tiny_config(image_store, text_store, tmp_path / "run", workers=2), place) as feed:
        time.sleep(0.2)
        assert not begun
        assert not locked
        assert [next(feed.batches)[0].step for _ in range(3)] == [0, 1, 2]
    ((device, thread),) = begun
    assert device == place.device
    assert [step for step, _ in locked[:3]] == [0, 1, 2]
    assert {ident for _, ident in locked} == {thread}
    assert not multiprocessing.active_children()
    assert not [one for one in threading.enumerate() if one.name.startswith(THREAD)]  # zarr's own come and stay


def test_plans_are_read_by_the_training_process_and_not_by_its_readers(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 16 readers would read, and check, the plans of all shards of every window."""
    monkeypatch.setattr(Store, "entries", _refused_in_a_reader(Store.entries))
    train(tiny_config(image_store, text_store, tmp_path / "run", workers=2, max_steps=2))


def _refused_in_a_reader(samples: Any) -> Any:
    def refusing(self: Store, *args: Any) -> Any:
        assert multiprocessing.parent_process() is None, "a reader reads a plan"
        return samples(self, *args)

    return refusing


def test_requests_say_where_each_image_is_in_the_order_of_its_rows(image_store: Store) -> None:
    requests = list(Requests(Order(store=image_store, seed=0, batch_size=8), first=2, steps=5, rank=1, world=2))
    assert [request.step for request in requests] == [2, 3, 4]
    for request in requests:
        assert request.rows_B.tolist() == request.all_rows_G[1::2].tolist()
        entries = image_store.samples(request.rows_B)
        assert request.places_B == [(entry["file"], entry["offset"], entry["size"]) for entry in entries]


def test_a_step_has_the_same_rows_in_the_same_order_however_many_processes_share_it(image_store: Store) -> None:
    """Also where a run goes on with fewer processes than it began with."""

    def rows_of_steps(world: int, first: int, steps: int) -> dict[int, list[int]]:
        found: dict[int, np.ndarray[Any, Any]] = {}
        for rank in range(world):
            order = Order(store=image_store, seed=0, batch_size=8)
            for request in Requests(order, first=first, steps=steps, rank=rank, world=world):
                found.setdefault(request.step, np.full(8, -1))[rank::world] = request.rows_B
        return {step: rows_G.tolist() for step, rows_G in found.items()}

    alone = rows_of_steps(1, 0, 30)
    assert len({tuple(rows) for rows in alone.values()}) == 30
    assert rows_of_steps(4, 0, 30) == alone
    assert rows_of_steps(4, 0, 17) | rows_of_steps(2, 17, 30) == alone


def test_no_more_requests_are_made_ahead_than_there_are_steps(
    image_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a million, of one image each, took seconds before the first batch."""
    asked: list[int] = []
    monkeypatch.setattr(
        batch_loader, "take_ahead", lambda items, ahead: asked.append(ahead) or take_ahead(items, ahead)
    )
    for first, steps in ((0, 3), (2, 3), (3, 3)):
        requests = Requests(Order(store=image_store, seed=0, batch_size=1), first=first, steps=steps)
        assert [request.step for request in requests] == list(range(first, steps))
    assert asked == [4, 2, 1]


def test_items_are_taken_ahead_in_one_thread_and_no_further() -> None:
    taken, threads = [], set()

    def numbers() -> Iterator[int]:
        for number in range(1, 100):
            taken.append(number)
            threads.add(threading.get_ident())
            yield number

    begun: list[int] = []
    items = take_ahead(numbers(), 3, lambda: begun.append(threading.get_ident()))
    assert not taken, "begun before the first was asked for"
    assert [next(items) for _ in range(2)] == [1, 2]
    for _ in range(200):
        if len(taken) == 5:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == [1, 2, 3, 4, 5]
    items.close()
    assert threads == set(begun)
    assert threading.get_ident() not in threads
    assert not [thread for thread in threading.enumerate() if thread.ident in threads]


def test_an_error_comes_where_its_item_would_have() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        yield 2
        raise TrainingError("the third")

    items = take_ahead(numbers(), 8)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(TrainingError, match="the third"):
        next(items)
    assert list(take_ahead(iter(np.arange(1, 6).tolist()), 2)) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_training_from_large_parquet_files_is_refused_with_its_price(
    text_store: Store, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "a.parquet", [{"image": make_jpeg((40, 40), seed=seed)} for seed in range(32)])
    images = cached("image", source, tmp_path / "images.zarr", clip)
    config = tiny_config(images, text_store, tmp_path / "run", batch_size=8, max_steps=2, checkpoint_every=1)
    with open_feed(config, ALONE) as feed:  # so small that it is as fast in any order
        assert len(list(feed.batches)) == 2
    monkeypatch.setattr("dimefm.training.feed_plan.KEPT_BYTES", 1000)
    remedy = r"--pixels 256 and another --out.*--set accept_slow=true"
    with pytest.raises(TrainingError, match=rf"images are in Parquet files(?s:.*){remedy}"), open_feed(config, ALONE):
        pass
    with open_feed(replace(config, accept_slow=True), ALONE) as feed:
        assert len(list(feed.batches)) == 2
    small = cached("image", source, tmp_path / "pixels.zarr", clip, pixels=32)
    with open_feed(replace(config, images=small.path), ALONE):
        pass
    train(replace(config, accept_slow=True, max_steps=1))
    with open_feed(replace(config, max_steps=2), ALONE) as feed:  # what has begun goes on
        assert feed.first_step == 1
