"""Search and evaluation on a GPU that is not there: under fake tensors, code with device="cuda" runs without one, and
raises where a tensor was left on the CPU. Nothing is computed; the numbers are for tests with the mark gpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dimefm.evaluation import text_embeddings
from dimefm.evaluation.features import Features
from dimefm.evaluation.linear_heads import BATCH, FeatureRows, train_heads
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.retrieval import exact_search
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.selection import clusters, grounding
from dimefm.selection.grounding import Grounding
from dimefm.system.transfer import Arriving
from tests.stores import random_store


class Sending:
    """In place of `Transfer`, whose stream needs a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


class Copies(TorchDispatchMode):
    """Counts copies between devices, each of which makes the CPU wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.count += 1
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number is read off the GPU"
        return out


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of 80 GB, with nothing in it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80_000_000_000, 80_000_000_000))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def test_fake_tensors_find_a_tensor_that_was_left_behind(fake_gpu: None) -> None:
    """Or the tests below would prove nothing."""
    with pytest.raises((RuntimeError, TypeError), match="device"):
        torch.ones(2, device="cuda") + torch.ones(2)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("resident", [0.7, 0.0])
def test_exact_search_stays_on_the_gpu(
    fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool, resident: float
) -> None:
    if mixed and not exact_search._MIXED:
        pytest.skip("this torch has no float32 products of halves")
    products = list[tuple[torch.dtype, torch.dtype]]()

    def noted(queries_QD: torch.Tensor, block_DN: torch.Tensor) -> torch.Tensor:
        scores_QN = product(queries_QD, block_DN)
        products.append((queries_QD.dtype, scores_QN.dtype))
        return scores_QN

    product: Any = exact_search._product
    monkeypatch.setattr(exact_search, "_MIXED", mixed)
    monkeypatch.setattr(exact_search, "_product", noted)
    monkeypatch.setattr(exact_search, "_RESIDENT", resident)
    monkeypatch.setattr(exact_search, "_GPU_BLOCK_ROWS", 2000)
    monkeypatch.setattr(exact_search, "Transfer", Sending)
    monkeypatch.setattr(exact_search, "fetch", lambda *tensors: Arriving(tensors, None))
    store, values = random_store(tmp_path / "s.zarr", rows=5000, shard_rows=2048, failed=(7,))
    search = ExactSearch(store, device="cuda")
    assert (search._kept is None) == (resident == 0)
    scores_QK, rows_QK = search._search(torch.from_numpy(values[:5000]).to("cuda"), 9)
    assert (scores_QK.device.type, scores_QK.dtype, scores_QK.shape) == ("cuda", torch.float32, (5000, 9))
    assert (rows_QK.device.type, rows_QK.dtype, rows_QK.shape) == ("cuda", torch.int64, (5000, 9))
    assert products == [(torch.float16 if mixed else torch.float32, torch.float32)] * 6, "three blocks, two parts each"


def test_scores_take_an_eighth_of_a_small_gpu(fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_search, "Transfer", Sending)
    store, _ = random_store(tmp_path / "s.zarr", rows=20, shard_rows=16)
    large = ExactSearch(store, device="cuda")
    assert large._queries * large._block_rows * 4 == 2**31
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4_000_000_000, 8_000_000_000))
    small = ExactSearch(store, device="cuda")
    assert 0.49e9 < small._queries * small._block_rows * 4 <= 0.5e9


@pytest.fixture
def train(tmp_path: Path) -> Features:
    return Features(random_store(tmp_path / "f.zarr", rows=5 * BATCH, shard_rows=128)[0])


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_probe_stays_on_the_gpu_and_waits_for_it_twice_an_epoch(
    train: Features, fake_gpu: None, multilabel: bool
) -> None:
    rows = np.arange(len(train))
    targets = torch.zeros(len(train), 3) if multilabel else torch.zeros(len(train), dtype=torch.int64)
    data = FeatureRows(train, rows, "cuda")
    start_CD = torch.zeros(3, 16, device="cuda")
    counts, trained = [], []
    with Copies() as copies:
        for heads in train_heads(data, targets, start_CD, [0.1, 0.01], [1e-3, 0.1], 4):
            counts.append(copies.count)
            trained.append(heads)
    heads = trained[-1]
    assert np.diff(counts).tolist() == [2, 2, 2], "of places and of targets; each epoch has five steps"
    assert {t.device.type for t in (heads.weight, heads.bias, heads.mean, heads.variance)} == {"cuda"}
    for block_BD in data.blocks():
        assert heads.logits(block_BD).device.type == "cuda"


def test_features_on_disk_are_found_by_places_on_the_cpu(train: Features, fake_gpu: None) -> None:
    data = FeatureRows(train, np.arange(len(train)), "cuda", limit=0)
    assert data.home == torch.device("cpu")
    real = SimpleNamespace(numpy=lambda: np.arange(BATCH))  # as places on the CPU are; a fake tensor has no numbers
    assert data.take(real).device.type == "cuda"  # type: ignore[arg-type]


def test_texts_come_off_the_gpu_once_a_block(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text_embeddings, "_BATCH", 8)
    monkeypatch.setattr(text_embeddings, "_BLOCK", 40)
    monkeypatch.setattr(text_embeddings, "token_counts", lambda tokens_ML: np.arange(len(tokens_ML))[::-1].copy())
    clip = SimpleNamespace(
        tokenize=lambda texts: torch.zeros(len(texts), 5, dtype=torch.int64),
        encode_tokens=lambda tokens_BL: torch.ones(len(tokens_BL), 16, device="cuda"),
        text_digest=lambda: "d",
    )
    with Copies() as copies:
        blocks = list(TextEmbeddings(clip, str(tmp_path))._embedded(["text"] * 100))  # type: ignore[arg-type]
    assert [(block_MD.device.type, block_MD.shape) for block_MD in blocks] == [("cpu", (n, 16)) for n in (40, 40, 20)]
    assert copies.count == 3


def test_scores_of_sentences_come_off_the_gpu_once_a_shard(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grounding, "_BLOCK", 16)
    images, _ = random_store(tmp_path / "i.zarr", rows=64, shard_rows=64)
    texts, values = random_store(tmp_path / "t.zarr", rows=64, shard_rows=64, kind="text")
    found = Grounding.sample(images, texts, 40, seed=0, device="cuda")
    assert (found.scaled_DM.device.type, found.offset_M.device.type) == ("cuda", "cuda")
    with Copies() as copies:
        scores_N = found._scores(torch.from_numpy(values).to("cuda"))
    assert (scores_N.device.type, scores_N.dtype, scores_N.shape) == ("cuda", torch.float32, (64,))
    assert copies.count == 1


def test_clusters_come_off_the_gpu_once_a_block(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SIMILARITIES", 64)
    with Copies() as copies:
        label_N, similarity_N = clusters._nearest(torch.zeros(100, 16).half(), torch.zeros(8, 16, device="cuda"))
    assert (label_N.device.type, similarity_N.device.type) == ("cpu", "cpu")
    assert copies.count == 3
