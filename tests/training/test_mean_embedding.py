"""The mean that the centred loss takes off: of the rows that are drawn, and the same after a stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from cache_schemas.document import CHECKSUM, digest_of
from dimefm.selection.select_images import ImageSelectionConfig, select_images
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from dimefm.training import build_towers as module
from dimefm.training.build_towers import build_towers
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig
from dimefm.training.distributed import Place
from dimefm.training.feed_plan import plan_feed
from dimefm.training.mean_embedding import mean_embedding
from dimefm.training.run_folder import plan_run, read_run
from dimefm.training.train import train
from tests.stores import random_store
from tests.tiny_training import tiny_config
from tests.training.test_train import interrupted_at

CENTRED = LossConfig(vl=0, pvl=0, centred=1)


def mean_of(store: Store, rows: np.ndarray[Any, Any]) -> torch.Tensor:
    found_ND = torch.from_numpy(store.gather(rows)).double()
    return found_ND[found_ND.any(dim=1)].mean(dim=0).float()


def test_mean_embedding_leaves_out_rows_that_have_none(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=40, shard_rows=32, failed=(0, 7))
    good = np.delete(values.astype(np.float64), [0, 7], axis=0)
    np.testing.assert_allclose(mean_embedding(store).numpy(), good.mean(axis=0), atol=1e-6)


def test_mean_embedding_of_a_large_store_reads_some_chunks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.training.mean_embedding._MOST_ROWS", 48)
    store, values = random_store(tmp_path / "s.zarr", rows=200, shard_rows=32)  # 13 chunks of 16 rows
    chosen = np.concatenate([values[:16], values[96:112], values[192:]]).astype(np.float64)
    np.testing.assert_allclose(mean_embedding(store).numpy(), chosen.mean(axis=0), atol=1e-6)


def test_mean_embedding_of_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=200, shard_rows=32, failed=(3,))  # 13 chunks of 16 rows

    def check(only: list[int], read: list[int]) -> None:
        found = mean_embedding(store, np.array(only)).numpy()
        np.testing.assert_allclose(found, values[read].astype(np.float64).mean(axis=0), atol=1e-6)

    check([3, 5, 40, 199], [5, 40, 199])
    monkeypatch.setattr("dimefm.training.mean_embedding._MOST_ROWS", 10)
    every = [row + more for row in range(16, 112, 16) for more in range(4)]  # of six chunks four rows each
    check(every, [*range(16, 20), *range(96, 100)])
    monkeypatch.setattr("dimefm.training.mean_embedding._MOST_READ", 32)
    check([5, 40, 60, 100, 199], [5, 199])


def test_a_run_takes_off_the_mean_of_its_selection_and_an_older_one_that_of_all(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = str(tmp_path / "i.selection")
    select_images(ImageSelectionConfig(images=image_store.path, out=selection, by="random", size=32, device="cpu"))
    config = tiny_config(
        image_store, text_store, tmp_path / "run", image_selection=selection, loss=CENTRED, checkpoint_every=1,
        max_steps=3,
    )  # fmt: skip
    means = list[torch.Tensor]()

    def spied(*words: Any) -> torch.Tensor:
        means.append(mean_embedding(*words))
        return means[-1]

    monkeypatch.setattr(module, "mean_embedding", spied)
    for stop in (1, 2):
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", interrupted_at(stop))
            with pytest.raises(KeyboardInterrupt):
                train(config)
    drawn = mean_of(image_store, SelectedImages(selection).rows())
    torch.testing.assert_close(means, [drawn, drawn])
    assert read_run(config.out).centred_on == "drawn"

    document = Path(config.out, "run.json")
    body = json.loads(document.read_text())
    del body["centred_on"], body[CHECKSUM]
    document.write_text(json.dumps({**body, CHECKSUM: digest_of(body)}))
    train(config)
    torch.testing.assert_close(means[2], mean_embedding(image_store))
    assert not torch.allclose(means[2], drawn)
    assert (read_run(config.out).centred_on, read_run(config.out).changes) == ("stored", ())


def test_a_text_tower_has_the_mean_of_its_own_sentences(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "mean-clip.json").write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "mean-clip.json")
    config = tiny_config(
        image_store, text_store, tmp_path / "run", student="mean-clip", text_student="mean-clip", text_batch_size=16,
        loss=CENTRED, text_loss=CENTRED,
    )  # fmt: skip
    plan = plan_feed(config, 1)
    run = plan_run(config, plan.inputs, 1, machine="m", processes=1, order="blocks", allow_changes=(), done=0)
    only = {"image": np.arange(0, 96, 5), "text": np.arange(0, 200, 7)}
    towers = build_towers(config, run, plan.inputs, Place(0, 1, torch.device("cpu")), only, resumed=False)
    for side, store in (("image", image_store), ("text", text_store)):
        torch.testing.assert_close(towers[side].objective.mean_D, mean_of(store, only[side]))
    plan = replace(plan, images=replace(plan.images, only=only["image"]), texts=replace(plan.texts, only=only["text"]))
    assert plan.only == only
