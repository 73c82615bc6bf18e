"""Index, exact search and pseudo texts: results against brute force in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest

from dimefm.errors import MismatchError, OutputExistsError, RecallError, StoreError
from dimefm.exact import exact_search
from dimefm.index import Index, IndexConfig, build_index, choose_factory, retrieve_with_index
from dimefm.pairs import Pairs
from dimefm.store import Store
from tests.stores import random_store


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "t.zarr", rows=3000, shard_rows=1024, kind="text", failed=(5, 1500), seed=1)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "i.zarr", rows=90, shard_rows=32, failed=(3, 40), seed=2)


def brute_force(values: np.ndarray, queries: np.ndarray, k: int, without: tuple[int, ...]) -> np.ndarray:
    scores = queries.astype(np.float32) @ values.astype(np.float32).T
    scores[:, list(without)] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def test_exact_search_is_brute_force_whatever_the_block(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, values = texts
    expected = brute_force(values, images[1][10:20], 7, (5, 1500))
    for block in (64, 1000, 65536):
        monkeypatch.setattr("dimefm.exact._BLOCK_ROWS", block)
        scores, rows = exact_search(store, images[1][10:20].astype(np.float32), 7)
        assert set(map(tuple, np.sort(rows, axis=1))) == set(map(tuple, np.sort(expected, axis=1)))
        assert (np.diff(scores, axis=1) <= 0).all()


def test_exact_search_says_when_there_are_too_few_rows(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=3, shard_rows=16, failed=(1,))
    scores, rows = exact_search(store, values[:1].astype(np.float32), 4)
    assert sorted(rows[0, :2].tolist()) == [0, 2]
    assert rows[0, 2:].tolist() == [-1, -1]
    assert np.isneginf(scores[0, 2:]).all()


@pytest.mark.parametrize(
    ("factory", "lists"), [(None, False), ("IVF16,Flat", True), ("IVF16,SQfp16", True), ("IVF16,PQ8x4fs", True)]
)
def test_an_index_reaches_the_recall_in_its_sidecar(
    texts: tuple[Store, np.ndarray],
    images: tuple[Store, np.ndarray],
    tmp_path: Path,
    factory: str | None,
    lists: bool,
) -> None:
    store, values = texts
    out = str(tmp_path / "t.index")
    sidecar = build_index(
        IndexConfig(store=store.path, out=out, factory=factory, recall_target=0.8, queries=images[0].path)
    )
    assert (sidecar.rows, sidecar.skipped) == (2998, 2)
    assert [r.source for r in sidecar.recall] == ["text", "image"]
    assert ("nprobe" in sidecar.search_parameters) == lists
    index, queries = Index(out), images[1][[0, 1, 2, 4, 5]]
    scores, rows = index.search(queries, 10, store)
    expected = brute_force(values, queries, 10, (5, 1500))
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), expected.tolist(), strict=True)])
    assert recall >= 0.75
    true = np.take_along_axis(queries.astype(np.float32) @ values.astype(np.float32).T, rows, 1)
    np.testing.assert_allclose(scores, true, atol=2e-3)


def test_an_index_below_its_target_is_not_kept_unless_accepted(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    config = IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index"), factory="PQ2x4fs", recall_target=0.999)
    with pytest.raises(RecallError, match=r"PQ2x4fs reaches recall@10 0\.\d+ for text queries, below 0.999"):
        build_index(config)
    assert not (tmp_path / "t.index").exists()
    build_index(IndexConfig(**{**config.__dict__, "accept": True}))
    assert Index(config.out).sidecar.recall[0].value < 0.999


def test_building_again_does_nothing_and_other_settings_are_refused(
    texts: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    config = IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index"))
    build_index(config)
    before = (tmp_path / "t.index" / "index.faiss").stat().st_mtime_ns
    build_index(config)
    assert (tmp_path / "t.index" / "index.faiss").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="factory: Flat != IVF16,Flat"):
        build_index(IndexConfig(store=texts[0].path, out=config.out, factory="IVF16,Flat"))


@pytest.mark.parametrize("factory", ["Nonsense", "IVF99999,Flat"])
def test_a_factory_that_cannot_be_built_is_refused(
    texts: tuple[Store, np.ndarray], tmp_path: Path, factory: str
) -> None:
    with pytest.raises(StoreError, match=f"--factory {factory}"):
        build_index(IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index"), factory=factory))
    assert not (tmp_path / "t.index").exists()


def test_a_damaged_index_is_refused(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "t.index"
    build_index(IndexConfig(store=texts[0].path, out=str(out)))
    file = out / "index.faiss"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"has .* bytes, its sidecar says"):
        Index(str(out))


def test_the_factory_follows_the_number_of_rows() -> None:
    assert choose_factory(100_000, 768) == ("Flat", 1)
    assert choose_factory(1_000_000, 768) == ("IVF4096,SQfp16", 1)
    assert choose_factory(28_400_000, 768) == ("IVF65536,PQ192x4fs", 10)
    assert choose_factory(100_000_000, 768) == ("IVF262144_HNSW32,PQ192x4fs", 10)


def retrieved(images: Store, texts: Store, tmp_path: Path, name: str = "p.zarr") -> Pairs:
    out = str(tmp_path / "t.index")
    build_index(IndexConfig(store=texts.path, out=out))
    retrieve_with_index(images.path, texts.path, out, top_k=4, out=str(tmp_path / name))
    return Pairs(str(tmp_path / name))


def test_pairs_are_the_nearest_sentences_and_hits_count_them(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    pairs = retrieved(images[0], texts[0], tmp_path)
    rows, scores = pairs.text_rows(0, 90), pairs.scores(0, 90).astype(np.float32)
    good = np.setdiff1d(np.arange(90), [3, 40])
    expected = brute_force(texts[1], images[1][good], 4, (5, 1500))
    assert (np.sort(rows[good], axis=1) == np.sort(expected, axis=1)).mean() > 0.99  # ties in fp16 may swap
    assert (rows[[3, 40]] == -1).all()
    assert np.isnan(scores[[3, 40]]).all()
    true = np.einsum("nd,nkd->nk", images[1][good].astype(np.float32), texts[1][rows[good]].astype(np.float32))
    np.testing.assert_allclose(scores[good], true, atol=2e-3)
    hits = np.bincount(rows[good].ravel(), minlength=3000)
    np.testing.assert_array_equal(pairs.hits(), hits)
    selection = pairs.selection()
    assert (selection.images, selection.selected) == (88, int((hits > 0).sum()))
    np.testing.assert_array_equal(pairs.gather(np.array([89, 0])), rows[[89, 0]])


def test_retrieve_goes_on_where_it_was_stopped(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrieved(images[0], texts[0], tmp_path)
    searched = []
    search = Index.search

    def stop_at_second(self: Index, *args: object) -> object:
        searched.append(1)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Index, "search", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        retrieved(images[0], texts[0], tmp_path, "again.zarr")
    with pytest.raises(StoreError, match="unfinished"):
        Pairs(str(tmp_path / "again.zarr")).hits()
    again = retrieved(images[0], texts[0], tmp_path, "again.zarr")
    assert len(searched) == 4, "the first shard was searched again"
    np.testing.assert_array_equal(again.text_rows(0, 90), whole.text_rows(0, 90))
    np.testing.assert_array_equal(again.scores(0, 90), whole.scores(0, 90))
    assert again.selection() == whole.selection()


def test_an_index_over_another_store_is_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    retrieved(images[0], texts[0], tmp_path)
    other, _ = random_store(tmp_path / "o.zarr", rows=3000, shard_rows=1024, kind="text", digest="another source")
    with pytest.raises(MismatchError, match="was built over"):
        retrieve_with_index(
            images[0].path, other.path, str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q.zarr")
        )
    stranger, _ = random_store(tmp_path / "w.zarr", rows=64, shard_rows=32, weights="another teacher")
    with pytest.raises(MismatchError, match=r"teacher.weights"):
        retrieve_with_index(
            stranger.path, texts[0].path, str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q.zarr")
        )
    with pytest.raises(OutputExistsError, match="top_k: 4 != 5"):
        retrieve_with_index(
            images[0].path, texts[0].path, str(tmp_path / "t.index"), top_k=5, out=str(tmp_path / "p.zarr")
        )


def test_a_sidecar_of_another_version_is_refused_with_the_remedy(
    texts: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    build_index(IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index")))
    path = tmp_path / "t.index" / "index.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 9}))
    with pytest.raises(ValueError, match="version 9 is not readable here"):
        Index(str(tmp_path / "t.index"))


def test_images_with_fewer_sentences_than_asked_have_none_in_their_place(tmp_path: Path) -> None:
    """One list of the index is probed, and holds fewer than k."""
    texts, _ = random_store(tmp_path / "t.zarr", rows=300, shard_rows=512, kind="text")
    images, _ = random_store(tmp_path / "i.zarr", rows=20, shard_rows=32, seed=5)
    out = str(tmp_path / "t.index")
    build_index(IndexConfig(store=texts.path, out=out, factory="IVF32,Flat", recall_target=0.01))
    selection = retrieve_with_index(images.path, texts.path, out, top_k=64, out=str(tmp_path / "p.zarr"))
    pairs = Pairs(str(tmp_path / "p.zarr"))
    rows, scores = pairs.text_rows(0, 20), pairs.scores(0, 20)
    assert (rows == -1).any()
    np.testing.assert_array_equal(np.isnan(scores), rows == -1)
    assert selection.mean_score == pytest.approx(float(np.nanmean(scores.astype(np.float64))), abs=1e-4)
    assert int(pairs.hits().sum()) == int((rows >= 0).sum())


def test_swapped_stores_are_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    retrieved(images[0], texts[0], tmp_path)
    with pytest.raises(MismatchError, match="holds text embeddings where image embeddings belong"):
        retrieve_with_index(texts[0].path, images[0].path, str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q"))


def test_recall_of_other_queries_is_not_taken_for_done(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    config = IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index"))
    build_index(config)
    with pytest.raises(OutputExistsError, match="queries"):
        build_index(IndexConfig(store=texts[0].path, out=config.out, queries=images[0].path))


def test_an_index_over_one_row_can_be_built(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=1, shard_rows=16, kind="text")
    assert build_index(IndexConfig(store=store.path, out=str(tmp_path / "s.index"))).rows == 1
