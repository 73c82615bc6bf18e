"""Stores of float32, as `evaluate` keeps its features: every reader gives what plain NumPy does of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.inspection.info import describe
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_search import IndexSearch
from dimefm.retrieval.recall import draw_recall_queries
from dimefm.retrieval.retrieve import retrieve
from dimefm.selection.clusters import cluster
from dimefm.selection.grounding import Grounding
from dimefm.selection.repetitions import repetitions
from dimefm.store.embedding_store import Store, _mean_view
from dimefm.store.pairs_store import Pairs
from dimefm.training.config import TextMix
from dimefm.training.text_bank import TextBank
from tests.stores import random_store

Pair = tuple[Store, np.ndarray]
FAILED = (5, 800)


def close_rows(count: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors so near to each other that float16 cannot tell which is the nearest."""
    rng = np.random.default_rng(seed)
    near = np.ones(width) + 1e-4 * rng.standard_normal((count, width))
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)


def nearest(values: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k rows of largest inner product in float64, best first, rows of zeros left out."""
    scores = queries.astype(np.float64) @ values.astype(np.float64).T
    scores[:, ~values.any(axis=1)] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.fixture(params=[16, 512])
def texts(tmp_path: Path, request: pytest.FixtureRequest) -> Pair:
    return random_store(
        tmp_path / "t.zarr", rows=1500, shard_rows=512, kind="text", failed=FAILED, seed=1, dtype="float32",
        embed_dim=request.param,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_row_but_those_that_are_zero_or_not_finite_is_valid(tmp_path: Path, dtype: Any) -> None:
    values = np.full((9, 16), 0.25, dtype)
    values[0], values[1, 5], values[2, 0], values[3, 15] = 0, np.nan, -np.inf, -np.finfo(dtype).max
    values[4], values[5, 3], values[6] = -0.0, np.inf, 0
    values[6, 2] = -np.finfo(dtype).smallest_subnormal
    store, _ = random_store(tmp_path / "s.zarr", rows=9, shard_rows=16, values=values, dtype=dtype)
    rows, embeddings = store.valid_rows(0, 9)
    assert rows.tolist() == [3, 6, 7, 8]
    assert embeddings.dtype == dtype
    np.testing.assert_array_equal(embeddings, values[rows])
    assert len(store.valid_rows(4, 4)[0]) == 0


def test_exact_search_finds_what_numpy_does(texts: Pair) -> None:
    store, values = texts
    queries = values[100:140]
    scores, rows = ExactSearch(store).search(queries, 7)
    np.testing.assert_array_equal(rows, nearest(values, queries, 7))
    true = np.take_along_axis(queries.astype(np.float64) @ values.astype(np.float64).T, rows, 1)
    np.testing.assert_allclose(scores, true, atol=1e-6)
    assert (rows[:, 0] == np.arange(100, 140)).all()


def test_queries_are_not_rounded_whatever_the_store_holds(tmp_path: Path) -> None:
    values = close_rows(200, 64, 0)
    for dtype in ("float32", "float16"):
        store, stored = random_store(
            tmp_path / f"{dtype}.zarr", rows=200, shard_rows=64, values=values, dtype=dtype, embed_dim=64
        )
        true = values.astype(np.float64) @ stored.astype(np.float64).T
        scores, rows = ExactSearch(store).search(values, 5)
        np.testing.assert_allclose(scores, np.take_along_axis(true, rows, 1), atol=3e-7)
        np.testing.assert_allclose(scores, -np.sort(-true, axis=1)[:, :5], atol=3e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("exact", [True, False])
def test_retrieve_gives_every_image_its_nearest_sentences(texts: Pair, tmp_path: Path, dtype: Any, exact: bool) -> None:
    """Of images in the same type, or the other."""
    store, values = texts
    images, image_values = random_store(
        tmp_path / "i.zarr", rows=90, shard_rows=32, failed=(3,), seed=2, dtype=dtype, embed_dim=values.shape[1]
    )
    index = None if exact else str(tmp_path / "t.index")
    if index:
        build_index(IndexConfig(store=store.path, out=index, factory="Flat"))
    selection = retrieve(images.path, store.path, index=index, top_k=4, out=str(tmp_path / "p"), device="cpu")
    assert (selection.images, selection.skipped) == (89, 1)
    found = Pairs(str(tmp_path / "p")).text_rows(0, 90)
    expected = nearest(values, image_values, 4)
    good = np.arange(90) != 3
    assert (found[good] == expected[good]).mean() > 0.995
    assert (found[3] == -1).all()


def test_an_index_finds_and_rescores_what_numpy_does(texts: Pair, tmp_path: Path) -> None:
    store, values = texts
    out = str(tmp_path / "t.index")
    sidecar = build_index(IndexConfig(store=store.path, out=out, factory="IVF8,PQ8x4fs", accept=True))
    assert sidecar.rows == 1498
    scores, rows = IndexSearch.open(out).search(values[100:140], 1)
    assert (rows[:, 0] == np.arange(100, 140)).mean() > 0.9
    np.testing.assert_allclose(scores[rows[:, 0] == np.arange(100, 140)], 1, atol=1e-6)
    (queries,) = draw_recall_queries(store, [(0, 1500)], None, 0)
    assert len(queries.vectors_QD) >= 998
    np.testing.assert_array_equal(queries.vectors_QD, values[queries.own_row_Q])
    np.testing.assert_array_equal(queries.rows_QK, nearest(values, queries.vectors_QD, 11))


def test_grounding_and_clusters_are_those_of_the_values(texts: Pair, tmp_path: Path) -> None:
    store, values = texts
    images, image_values = random_store(
        tmp_path / "i.zarr", rows=64, shard_rows=32, seed=2, dtype="float32", embed_dim=values.shape[1]
    )
    grounding = Grounding.sample(images, store, 64, seed=0, device="cpu")
    rows, embedding = store.valid_rows(0, 1500)
    cosine = values[rows].astype(np.float64) @ image_values.astype(np.float64).T
    z = (cosine - cosine.mean(axis=0)) / cosine.std(axis=0)
    expected = (np.sort(z, axis=1)[:, -4:].mean(axis=1) - z.mean(axis=1)) / z.std(axis=1)
    np.testing.assert_allclose(grounding.scores(embedding), expected, rtol=1e-3)

    folder = str(tmp_path / "clusters")
    labels = cluster(store, rows, folder, seed=0, device="cpu", copies=True)
    assert len(np.unique(labels)) > 20
    like = repetitions(store, rows, labels, folder, 0.999999, device="cpu")
    assert (like == -1).all()


def test_info_says_the_type_and_the_bytes(texts: Pair, tmp_path: Path) -> None:
    store, values = texts
    size = (Path(store.path) / "embedding").rglob("*")
    on_disk = sum(path.stat().st_size for path in size if path.is_file())
    assert store.schema.item_bytes * values.size == values.nbytes <= on_disk
    shown = describe(store.path)
    amount = {16: "96.0 kB", 512: "3.1 MB"}[values.shape[1]]
    assert f"float32 (1,500, {values.shape[1]}), {amount}" in shown
    half, _ = random_store(tmp_path / "half.zarr", rows=1500, shard_rows=512, embed_dim=values.shape[1])
    assert f"float16 (1,500, {values.shape[1]})" in describe(half.path)


def test_an_export_has_the_values_to_the_last_bit(texts: Pair, tmp_path: Path) -> None:
    store, values = texts
    folder = Path(export_embeddings(store.path, str(tmp_path / "out"), rows_per_file=1500))
    exported = np.load(folder / "text_emb" / "text_emb_0.npy")
    assert exported.tobytes() == np.delete(values, FAILED, axis=0).tobytes()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_text_batch_has_the_values_and_counts_their_bytes(
    texts: Pair, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, values = texts
    room = values.nbytes if place == "memory" else values.nbytes - 1
    monkeypatch.setattr("dimefm.training.text_bank._room_in_memory", lambda: room)
    bank = TextBank(store, TextMix(), None, seed=0, total=50)
    assert bank.kept_in == place
    drawn = bank.draw(0, np.arange(4))
    found = bank.embeddings(drawn, lambda tensor: tensor)
    assert found.numpy().tobytes() == values[drawn.rows_T.numpy()].tobytes()
    assert drawn.embedding_TD is not None
    assert bank.bytes_of_step(4) == drawn.embedding_TD.nbytes


def test_the_mean_of_views_keeps_their_type() -> None:
    views = np.random.default_rng(0).standard_normal((6, 3, 16)).astype(np.float32)
    mean = views.astype(np.float64).mean(axis=1)
    found = _mean_view(views)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert _mean_view(views.astype(np.float16)).dtype == np.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gpu_finds_what_numpy_does(tmp_path: Path, dtype: Any) -> None:
    """Products in TF32 or of halves would be off by a thousandth where float16 does not hold the queries."""
    values = close_rows(3000, 768, 0)
    store, stored = random_store(
        tmp_path / "s.zarr", rows=3000, shard_rows=1024, values=values, dtype=dtype, embed_dim=768
    )
    true = values.astype(np.float64) @ stored.astype(np.float64).T
    scores, rows = ExactSearch(store, device="cuda").search(values, 5)
    np.testing.assert_allclose(scores, np.take_along_axis(true, rows, 1), atol=1e-6)
    np.testing.assert_allclose(scores, -np.sort(-true, axis=1)[:, :5], atol=1e-6)
