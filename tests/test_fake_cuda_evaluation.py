"""Search and evaluation on a GPU that is not there: under fake tensors, code with device="cuda" runs without one, and
raises where a tensor was left on the CPU. Nothing is computed; the numbers are for tests with the mark gpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dimefm import exact
from dimefm.exact import ExactSearch
from dimefm.transfer import Arriving
from tests.stores import random_store


class Sending:
    """In place of `Transfer`, whose stream needs a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


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
    if mixed and not exact._MIXED:
        pytest.skip("this torch has no float32 products of halves")
    products = list[tuple[torch.dtype, torch.dtype]]()

    def noted(queries_QD: torch.Tensor, block_DN: torch.Tensor) -> torch.Tensor:
        scores_QN = product(queries_QD, block_DN)
        products.append((queries_QD.dtype, scores_QN.dtype))
        return scores_QN

    product: Any = exact._product
    monkeypatch.setattr(exact, "_MIXED", mixed)
    monkeypatch.setattr(exact, "_product", noted)
    monkeypatch.setattr(exact, "_RESIDENT", resident)
    monkeypatch.setattr(exact, "_GPU_BLOCK_ROWS", 2000)
    monkeypatch.setattr(exact, "Transfer", Sending)
    monkeypatch.setattr(exact, "fetch", lambda *tensors: Arriving(tensors, None))
    store, values = random_store(tmp_path / "s.zarr", rows=5000, shard_rows=2048, failed=(7,))
    search = ExactSearch(store, device="cuda")
    assert (search._kept is None) == (resident == 0)
    scores_QK, rows_QK = search._search(torch.from_numpy(values[:5000]).to("cuda"), 9)
    assert (scores_QK.device.type, scores_QK.dtype, scores_QK.shape) == ("cuda", torch.float32, (5000, 9))
    assert (rows_QK.device.type, rows_QK.dtype, rows_QK.shape) == ("cuda", torch.int64, (5000, 9))
    assert products == [(torch.float16 if mixed else torch.float32, torch.float32)] * 6, "three blocks, two parts each"


def test_scores_take_an_eighth_of_a_small_gpu(fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "Transfer", Sending)
    store, _ = random_store(tmp_path / "s.zarr", rows=20, shard_rows=16)
    large = ExactSearch(store, device="cuda")
    assert large._queries * large._block_rows * 4 == 2**31
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4_000_000_000, 8_000_000_000))
    small = ExactSearch(store, device="cuda")
    assert 0.49e9 < small._queries * small._block_rows * 4 <= 0.5e9
