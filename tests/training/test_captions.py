"""Training with the captions of images: which are drawn, what a run records of them, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm.errors import MismatchError, TrainingError
from dimefm.models.clip import Clip
from dimefm.store.captions import Captions, open_captions
from dimefm.store.embedding_store import Store
from dimefm.system.transfer import Transfer
from dimefm.training import text_bank
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.dry_run import foresee
from dimefm.training.feed import _text_bank
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import Inputs, read_run
from dimefm.training.text_bank import TextBank
from dimefm.training.train import train
from pipeline.cache import CacheConfig, cache, captions_place
from tests.making import read_tar, write_tar
from tests.tiny_training import same, tiny_config, weights

CPU = torch.device("cpu")
BOTH = {"loss": LossConfig(vl=0.5, contrastive=0.5), "text_mix": TextMix(random=0.5, captions=0.5)}


def captions_of(number: int) -> list[str]:
    """None for image 0; one for every odd one, the same for all of them; two for the others, of their own."""
    if number % 2:
        return ["a picture"]
    return [f"picture {number} by day", f"picture {number} by night"] if number else []


@pytest.fixture(scope="module")
def cached(image_tar: Path, teacher_name: str, tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    """The 96 images of `image_tar` with captions. Shared by all tests: not to be written to."""
    folder, members = tmp_path_factory.mktemp("captioned"), dict[str, bytes]()
    images = [(name, data) for name, data in read_tar(image_tar, 200).items() if name.endswith(".jpg")]
    for number, (name, data) in enumerate(images):
        members[name] = data
        members[name.replace(".jpg", ".txt")] = "\n".join(captions_of(number)).encode()
    tar = write_tar(folder / "images.tar", members)
    config = CacheConfig(
        kind="image", sources=(str(tar),), out=str(folder / "I.zarr"), teacher=teacher_name, captions="txt",
        shard_rows=32, workers=1, device="cpu",
    )  # fmt: skip
    cache(config)
    return config


@pytest.fixture(scope="module")
def images(cached: CacheConfig) -> Store:
    return Store(cached.out)


@pytest.fixture(scope="module")
def captions(cached: CacheConfig, images: Store) -> Captions:
    return open_captions(captions_place(cached), images)


def config_of(images: Store, texts: Store, captions: Captions, out: Path, **changes: Any) -> TrainConfig:
    return tiny_config(images, texts, out, **{"captions": captions.texts.path, **BOTH, **changes})


def bank_of(images: Store, texts: Store, captions: Captions, **changes: Any) -> TextBank:
    config = config_of(images, texts, captions, Path("unused"), **changes)
    bank = _text_bank(config, Inputs(images, texts, None, None, captions), 0, Place(0, 1, CPU))
    assert bank is not None
    return bank


@pytest.mark.parametrize("place", ["disk", "memory", "device"])
def test_captions_are_those_of_the_batch(
    place: str, images: Store, text_store: Store, captions: Captions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_bank, "_room_in_memory", lambda: 2**40 * (place == "memory"))
    monkeypatch.setattr(text_bank, "_room_on", lambda device: 2**40 * (place == "device"))
    bank, send, rows_G = bank_of(images, text_store, captions), Transfer(CPU).send, np.array([2, 0, 4, 1, 3])
    bank.upload(CPU)
    own = captions.pairs.gather(rows_G)
    allowed = {*own[own >= 0].tolist()}
    assert len(allowed) == 5
    drawn = bank.draw(0, rows_G)
    assert drawn.captions is not None
    assert len(drawn.rows_T) == len(drawn.captions.rows_T) == 32
    assert {*drawn.captions.rows_T.tolist()} == allowed
    text_TD = bank.embeddings(drawn, send)
    expected = np.concatenate(
        [text_store.gather(drawn.rows_T.numpy()), captions.texts.gather(drawn.captions.rows_T.numpy())]
    )
    np.testing.assert_array_equal(text_TD.numpy(), expected.astype(np.float32))
    pair = bank.pair(drawn, send)
    assert pair is not None
    embedding_GD, row_G = pair
    assert row_G[1] == -1
    assert row_G[3] == row_G[4] >= 0, "two images with the same caption have two rows"
    usable = [0, 2, 3, 4]
    np.testing.assert_array_equal(
        embedding_GD[usable].numpy(), captions.texts.gather(row_G[usable].numpy()).astype(np.float32)
    )
    assert bank.bytes_of_step(5) == (0 if place == "device" else (64 + 5) * 128 * 2)


def test_an_image_has_another_of_its_captions_in_another_step(
    images: Store, text_store: Store, captions: Captions
) -> None:
    bank, rows_G = bank_of(images, text_store, captions, loss=LossConfig(vl=0, contrastive=1)), np.array([2, 4, 6])
    assert bank.kept_in == "disk", "sentences are kept that no loss looks at"

    def own(step: int, seed_bank: TextBank = bank) -> list[int]:
        drawn = seed_bank.draw(step, rows_G)
        assert drawn.captions is not None
        assert drawn.captions.pair_row_G is not None
        assert len(drawn.rows_T) == len(drawn.captions.rows_T) == 0
        return drawn.captions.pair_row_G.tolist()

    assert own(3) == own(3)
    times = [Counter(rows) for rows in zip(*(own(step) for step in range(400)), strict=True)]
    for row, counts in zip(rows_G, times, strict=True):
        assert {*counts} == {*captions.pairs.gather(np.array([row]))[0].tolist()}
        assert min(counts.values()) > 150, "one caption is drawn more often than the other"
    assert times[0] != times[1]
    other = bank_of(images, text_store, captions, loss=LossConfig(vl=0, contrastive=1), seed=1)
    assert [own(step) for step in range(8)] != [own(step, other) for step in range(8)]


def test_a_run_with_captions_resumes_to_the_last_bit(
    images: Store, text_store: Store, captions: Captions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config_of(images, text_store, captions, tmp_path / "whole")
    train(whole)
    assert {"vl", "contrastive"} <= [line for line in read_metrics(whole.out) if line["event"] == "train"][-1].keys()
    run = read_run(whole.out)
    assert run.captions_identity == captions.texts.schema.identity
    assert run.captions_data == captions.texts.contents.digest
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, *given: Any) -> None:
        save(self, step, *given)
        raise KeyboardInterrupt

    part = replace(whole, out=str(tmp_path / "part"))
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(part)
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(MismatchError, match="captions_identity"):
        train(replace(part, captions=None, text_mix=TextMix(), loss=LossConfig(vl=1)))
    train(part)
    assert same(weights(part.out), weights(whole.out))


def test_captions_teach_something_else_than_random_sentences(
    images: Store, text_store: Store, captions: Captions, tmp_path: Path
) -> None:
    one = config_of(images, text_store, captions, tmp_path / "one", max_steps=2, loss=LossConfig(vl=1))
    other = replace(one, out=str(tmp_path / "other"), captions=None, text_mix=TextMix())
    train(one)
    train(other)
    assert not same(weights(one.out), weights(other.out))


def test_a_dry_run_counts_both_stores(images: Store, text_store: Store, captions: Captions, tmp_path: Path) -> None:
    found = foresee(config_of(images, text_store, captions, tmp_path / "run"))
    assert found.sentences == text_store.schema.rows + captions.texts.schema.rows
    assert found.text_bank == (text_store.schema.rows + captions.texts.schema.rows) * 128 * 2
    json.dumps(found.to_json())


def test_captions_without_use_and_use_without_captions(
    images: Store, text_store: Store, captions: Captions, tmp_path: Path
) -> None:
    place = captions.texts.path
    with pytest.raises(TrainingError, match="captions are given, but neither the text mix nor the loss"):
        tiny_config(images, text_store, tmp_path, captions=place)
    with pytest.raises(TrainingError, match="pairs are given, but neither"):  # captions stand in their place
        tiny_config(images, text_store, tmp_path, captions=place, pairs="p.zarr", loss=LossConfig(contrastive=1))
    with pytest.raises(TrainingError, match="captions in the text mix need --captions"):
        train(tiny_config(images, text_store, tmp_path, text_mix=TextMix(random=0.5, captions=0.5)))
    with pytest.raises(TrainingError, match="the contrastive loss needs --captions or --pairs"):
        train(tiny_config(images, text_store, tmp_path, loss=LossConfig(contrastive=1)))
    with pytest.raises(TrainingError, match=r"random=0\.5,captions=0\.4 does not add up to 1"):
        tiny_config(images, text_store, tmp_path, text_mix=TextMix(random=0.5, captions=0.4))


def test_a_batch_without_captions(images: Store, text_store: Store, captions: Captions) -> None:
    bank = bank_of(images, text_store, captions)
    with pytest.raises(TrainingError, match="step 4: no image of the batch has a caption"):
        bank.draw(3, np.array([0]))


def test_captions_of_another_teacher_or_of_other_images(
    images: Store, image_store: Store, text_store: Store, captions: Captions, tmp_path: Path, clip: Clip
) -> None:
    with pytest.raises(MismatchError, match="was made over other images"):
        train(config_of(image_store, text_store, captions, tmp_path / "run"))
