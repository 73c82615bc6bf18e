"""The queries that a recall is measured with, where most of a store failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dimefm.errors import StoreError
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.recall import draw_recall_queries
from tests.stores import random_store


def test_queries_are_drawn_from_the_rows_that_have_an_embedding(tmp_path: Path) -> None:
    """Or of a store of which one in a hundred has one, a hundredth of the queries would be left, with no word of it."""
    store, _ = random_store(tmp_path / "t.zarr", rows=600, shard_rows=256, kind="text")
    failed = tuple(row for row in range(3000) if row % 100)
    images, _ = random_store(tmp_path / "i.zarr", rows=3000, shard_rows=1024, failed=failed, seed=1)
    of_images, of_texts = draw_recall_queries(store, [(0, 600)], images, 0)
    assert (len(of_images.vectors_QD), len(of_texts.vectors_QD)) == (30, 600)
    assert of_images.vectors_QD.any(axis=1).all()


def test_a_recall_of_no_query_is_an_error(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=600, shard_rows=256, kind="text")
    images, _ = random_store(tmp_path / "i.zarr", rows=20, shard_rows=16, failed=tuple(range(20)), seed=1)
    config = IndexConfig(store=store.path, out=str(tmp_path / "t.index"), queries=images.path)
    with pytest.raises(StoreError, match=r"i\.zarr: none of its 20 images has an embedding"):
        build_index(config)
