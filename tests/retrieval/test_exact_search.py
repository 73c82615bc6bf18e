"""Exact search: the result of NumPy's brute force, whatever the blocks."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dimefm.errors import StoreError
from dimefm.retrieval import exact_search
from dimefm.retrieval.exact_search import ExactSearch, _top
from dimefm.store.embedding_store import Store
from tests.stores import brute_force, random_store


@pytest.mark.parametrize(("block", "queries"), [(64, 4096), (1000, 3), (16384, 4096)])
def test_the_nearest_rows_are_those_of_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, queries: int
) -> None:
    monkeypatch.setattr("dimefm.retrieval.exact_search._BLOCK_ROWS", block)
    monkeypatch.setattr("dimefm.retrieval.exact_search._QUERIES", queries)
    store, values = random_store(tmp_path / "s.zarr", rows=3000, shard_rows=1024, failed=(5, 1500), seed=1)
    scores, rows = ExactSearch(store).search(values[100:110].astype(np.float32), 7)
    expected = brute_force(values, values[100:110], 7, (5, 1500))
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(expected, axis=1))
    true = np.take_along_axis(values[100:110].astype(np.float32) @ values.astype(np.float32).T, rows, 1)
    np.testing.assert_allclose(scores, true, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert scores.dtype == np.float32


def test_rows_that_are_kept_give_the_same_and_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.retrieval.exact_search._BLOCK_ROWS", 300)
    store, values = random_store(tmp_path / "s.zarr", rows=1000, shard_rows=256, failed=(5, 700), seed=1)
    kept, query = ExactSearch(store, keep=True), values[100:101].astype(np.float32)
    expected = ExactSearch(store).search(query, 9)
    monkeypatch.setattr(Store, "read", None)
    for one, other in zip(kept.search(query, 9), expected, strict=True):
        np.testing.assert_array_equal(one, other)


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
    rows, embeddings = store.valid_rows(0, 6)
    assert rows.tolist() == [3, 5]
    np.testing.assert_array_equal(embeddings, values[[3, 5]])


def test_the_next_block_is_read_while_one_is_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no further one, or the blocks that wait would fill the memory."""
    monkeypatch.setattr("dimefm.retrieval.exact_search._BLOCK_ROWS", 64)
    store, _ = random_store(tmp_path / "s.zarr", rows=300, shard_rows=128)
    begun, second = list[int](), threading.Event()

    valid_rows = Store.valid_rows

    def noted(store: Store, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        begun.append(start)
        if start == 64:
            second.set()
        return valid_rows(store, start, stop)

    monkeypatch.setattr(Store, "valid_rows", noted)
    blocks = ExactSearch(store)._blocks()
    next(blocks)
    assert second.wait(10), "the second block is read only when it is asked for"
    assert begun == [0, 64]
    assert len(list(blocks)) == 4
    assert begun == [0, 64, 128, 192, 256]


def test_what_fails_while_a_block_is_read_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimefm.retrieval.exact_search._BLOCK_ROWS", 64)
    store, values = random_store(tmp_path / "s.zarr", rows=300, shard_rows=128)
    (tmp_path / "s.zarr" / "embedding" / "c" / "2" / "0").unlink()
    with pytest.raises(StoreError, match=r"c/2/0 is missing"):
        ExactSearch(store).search(values[:1].astype(np.float32), 4)


def test_over_no_rows_nothing_is_found(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=3, shard_rows=16)
    assert ExactSearch(store, ranges=()).search(values[:1].astype(np.float32), 2)[1].tolist() == [[-1, -1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("resident", "mixed"), [(0.7, True), (0.0, True), (0.7, False)])
def test_a_gpu_finds_what_the_cpu_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: float, mixed: bool
) -> None:
    """With the rows in its memory or read as they are needed, by products of halves or in TF32. Products that were
    rounded to halves, or sums that were, would be off by a thousandth."""
    if mixed and not exact_search._MIXED:
        pytest.skip("this torch has no float32 products of halves")
    monkeypatch.setattr(exact_search, "_RESIDENT", resident)
    monkeypatch.setattr(exact_search, "_MIXED", mixed)
    monkeypatch.setattr(exact_search, "_GPU_BLOCK_ROWS", 7000)
    monkeypatch.setattr(exact_search, "_GPU_QUERIES", 200)
    store, values = random_store(
        tmp_path / "s.zarr", rows=40_000, shard_rows=8192, seed=1, embed_dim=768, failed=(3, 7001, 39_999)
    )
    queries = values[100:612].astype(np.float32)
    (cpu_scores, cpu_rows), (gpu_scores, gpu_rows) = (
        ExactSearch(store, device=d).search(queries, 10) for d in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu_scores, cpu_scores, atol=1e-5)
    assert (gpu_rows == cpu_rows).mean() > 0.98, "but for those that nearly tie"
    true = np.einsum("qd,qkd->qk", queries.astype(np.float64), values[gpu_rows].astype(np.float64))
    np.testing.assert_allclose(gpu_scores, true, atol=1e-5)
