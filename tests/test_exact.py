"""Exact search: the result of NumPy's brute force, whatever the blocks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dimefm.exact import ExactSearch, _top, valid_rows
from tests.stores import brute_force, random_store


@pytest.mark.parametrize(("block", "queries"), [(64, 4096), (1000, 3), (16384, 4096)])
def test_the_nearest_rows_are_those_of_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, queries: int
) -> None:
    monkeypatch.setattr("dimefm.exact._BLOCK_ROWS", block)
    monkeypatch.setattr("dimefm.exact._QUERIES", queries)
    store, values = random_store(tmp_path / "s.zarr", rows=3000, shard_rows=1024, failed=(5, 1500), seed=1)
    scores, rows = ExactSearch(store).search(values[100:110].astype(np.float32), 7)
    expected = brute_force(values, values[100:110], 7, (5, 1500))
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(expected, axis=1))
    true = np.take_along_axis(values[100:110].astype(np.float32) @ values.astype(np.float32).T, rows, 1)
    np.testing.assert_allclose(scores, true, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert scores.dtype == np.float32


@pytest.mark.parametrize("width", [1, 63, 64, 65, 700, 64 * 40 + 7])
def test_the_largest_of_a_row_are_found_through_its_groups(width: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(width).standard_normal((5, width)).astype(np.float32))
    found, column = _top(scores, 9)
    expected = scores.topk(min(9, width), dim=1)
    assert torch.equal(found, expected.values)
    assert torch.equal(scores.gather(1, column), expected.values)


def test_fewer_rows_than_asked_for(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=3, shard_rows=16, failed=(1,))
    scores, rows = ExactSearch(store).search(values[:1].astype(np.float32), 4)
    assert sorted(rows[0, :2].tolist()) == [0, 2]
    assert rows[0, 2:].tolist() == [-1, -1]
    assert np.isneginf(scores[0, 2:]).all()


def test_rows_that_are_zero_or_not_finite_are_not_valid(tmp_path: Path) -> None:
    values = np.full((6, 16), 0.25, np.float16)
    values[0], values[1, 5], values[2, 0], values[3, 15] = 0, np.nan, -np.inf, -65504
    values[4] = -0.0
    store, _ = random_store(tmp_path / "s.zarr", rows=6, shard_rows=16, values=values)
    rows, embeddings = valid_rows(store, 0, 6)
    assert rows.tolist() == [3, 5]
    np.testing.assert_array_equal(embeddings, values[[3, 5]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=40_000, shard_rows=8192, seed=1, embed_dim=64)
    queries = values[:512].astype(np.float32)
    (cpu_scores, _), (gpu_scores, gpu_rows) = (
        ExactSearch(store, device=d).search(queries, 10) for d in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu_scores, cpu_scores, atol=1e-5)
    true = np.einsum("qd,qkd->qk", queries, values[gpu_rows].astype(np.float32))
    np.testing.assert_allclose(gpu_scores, true, atol=1e-5)
