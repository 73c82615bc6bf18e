"""Pseudo texts: the nearest sentences of every image, by an index and exactly, through stops and damage."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cache_schemas import PairsStore
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_search import IndexSearch
from dimefm.retrieval.open_search import EXACT, open_in_seat
from dimefm.retrieval.retrieve import retrieve, write_pairs
from dimefm.retrieval.retrieve_shards import batches
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system.shard_work import Seat
from tests.stores import brute_force, random_store


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "t.zarr", rows=3000, shard_rows=1024, kind="text", failed=(5, 1500), seed=1)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "i.zarr", rows=90, shard_rows=32, failed=(3, 40), seed=2)


def retrieved(images: Store, texts: Store, tmp_path: Path, name: str = "p.zarr", *, exact: bool = False) -> Pairs:
    index = None if exact else str(tmp_path / "t.index")
    if index:
        build_index(IndexConfig(store=texts.path, out=index))
    retrieve(images.path, texts.path, index=index, top_k=4, out=str(tmp_path / name), device="cpu")
    return Pairs(str(tmp_path / name))


@pytest.mark.parametrize("exact", [False, True])
def test_pairs_are_the_nearest_sentences_and_hits_count_them(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, exact: bool
) -> None:
    pairs = retrieved(images[0], texts[0], tmp_path, exact=exact)
    assert (pairs.schema.index == EXACT) == exact
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
    counts = pairs.hit_counts()
    assert (counts.images, counts.skipped, counts.selected) == (88, 2, int((hits > 0).sum()))
    np.testing.assert_array_equal(pairs.gather(np.array([89, 0])), rows[[89, 0]])


def test_a_commit_says_on_what_was_searched(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    """Another kind of device rounds otherwise."""
    search = ExactSearch(texts[0])
    search.device = "cuda"  # as a search on a GPU would say
    words = {"index": "e", "index_digest": "e", "top_k": 2}
    for name, searching in (("gpu", search), ("cpu", ExactSearch(texts[0]))):
        out = tmp_path / f"{name}.zarr"
        write_pairs(images[0], texts[0], searching, out=str(out), **words)  # type: ignore[arg-type]
        commits = [json.loads(path.read_text()) for path in sorted((out / "commits").glob("0*.json"))]
        assert {commit["device"] for commit in commits} == {"cuda" if name == "gpu" else "cpu"}


def test_retrieve_goes_on_where_it_was_stopped(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.retrieval.retrieve_shards._LEAST", 1)
    whole = retrieved(images[0], texts[0], tmp_path)
    searched = []
    search = IndexSearch.search

    def stop_at_second(self: IndexSearch, *args: object) -> object:
        searched.append(1)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(IndexSearch, "search", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        retrieved(images[0], texts[0], tmp_path, "again.zarr")
    with pytest.raises(StoreError, match="unfinished"):
        Pairs(str(tmp_path / "again.zarr")).hits()
    again = retrieved(images[0], texts[0], tmp_path, "again.zarr")
    assert len(searched) == 4, "the first shard was searched again"
    np.testing.assert_array_equal(again.text_rows(0, 90), whole.text_rows(0, 90))
    np.testing.assert_array_equal(again.scores(0, 90), whole.scores(0, 90))
    assert again.hit_counts() == whole.hit_counts()


def test_small_shards_are_searched_together_and_written_alone(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when one of them is done again: a score may depend on the queries beside it."""
    asked, search = list[int](), ExactSearch.search

    def counting(self: ExactSearch, queries_QD: np.ndarray, k: int) -> object:
        asked.append(len(queries_QD))
        return search(self, queries_QD, k)

    monkeypatch.setattr(ExactSearch, "search", counting)
    retrieved(images[0], texts[0], tmp_path, exact=True)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "p.zarr").rglob("*/c/*/0")}
    (tmp_path / "p.zarr" / "commits" / "000001.json").unlink()
    retrieved(images[0], texts[0], tmp_path, exact=True)
    assert asked == [88, 88]
    changed = {path.parent.name for path, at in files.items() if path.stat().st_mtime_ns != at}
    assert changed == {"1"}


def test_batches_are_of_a_thousand_images_at_least_and_depend_on_the_images_alone() -> None:
    def sizes(rows: int, shard_rows: int, pending: Sequence[int] | None = None) -> list[tuple[int, int]]:
        schema = PairsStore(
            images="i", images_identity="i", texts="t", texts_identity="t", index="e", index_digest="e", top_k=1,
            rows=rows, text_rows=9, shard_rows=shard_rows,
        )  # fmt: skip
        found = batches(schema, dict.fromkeys(range(schema.shards) if pending is None else pending, ""))
        return [(len(batch.shards), len(batch.pending)) for batch in found]

    assert sizes(5000, 1000) == [(2, 2), (2, 2), (1, 1)]
    assert sizes(5000, 1000, [1, 4]) == [(2, 1), (1, 1)]
    assert sizes(40_000_000, 65536) == [(1, 1)] * 611
    assert sizes(1_000_000, 4096)[0] == (4, 4)  # 64 batches, for as many workers
    assert sizes(40_000_000, 1000)[0] == (66, 66)


def test_an_index_that_was_built_again_meanwhile_is_not_searched(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    retrieved(images[0], texts[0], tmp_path)
    with pytest.raises(StoreError, match="was built again while this command runs"):
        open_in_seat(texts[0], str(tmp_path / "t.index"), "digest of the one before", None, Seat(1, "cpu"))


def test_finished_pairs_are_shown_as_done(
    texts: tuple[Store, np.ndarray],
    images: tuple[Store, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        retrieved(images[0], texts[0], tmp_path, exact=True)
        assert "retrieving: 90 of 90 images (100%)" in capsys.readouterr().err


def test_an_index_over_another_store_is_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    retrieved(images[0], texts[0], tmp_path)
    other, _ = random_store(tmp_path / "o.zarr", rows=3000, shard_rows=1024, kind="text", digest="another source")
    with pytest.raises(MismatchError, match="was built over"):
        retrieve(images[0].path, other.path, index=str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q.zarr"))
    stranger, _ = random_store(tmp_path / "w.zarr", rows=64, shard_rows=32, weights="another teacher")
    with pytest.raises(MismatchError, match=r"teacher.weights"):
        retrieve(stranger.path, texts[0].path, index=str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q.zarr"))
    with pytest.raises(OutputExistsError, match="top_k: 4 != 5"):
        retrieve(images[0].path, texts[0].path, index=str(tmp_path / "t.index"), top_k=5, out=str(tmp_path / "p.zarr"))
    with pytest.raises(OutputExistsError, match=r"--index: .*t\.index \([0-9a-f]{12}\) != none \(exact search\)"):
        retrieve(images[0].path, texts[0].path, top_k=4, out=str(tmp_path / "p.zarr"), device="cpu")
    next((tmp_path / "t.index").glob("index-*")).write_bytes(b"cut")
    with pytest.raises(StoreError, match="has 3 bytes, its sidecar says"):
        retrieve(images[0].path, texts[0].path, index=str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q.zarr"))
    assert not (tmp_path / "q.zarr").exists()


def test_images_with_fewer_sentences_than_asked_have_none_in_their_place(tmp_path: Path) -> None:
    """One list of the index is probed, and holds fewer than k."""
    texts, _ = random_store(tmp_path / "t.zarr", rows=300, shard_rows=512, kind="text")
    images, _ = random_store(tmp_path / "i.zarr", rows=20, shard_rows=32, seed=5)
    out = str(tmp_path / "t.index")
    build_index(IndexConfig(store=texts.path, out=out, factory="IVF32,Flat", recall_target=0.01))
    counts = retrieve(images.path, texts.path, index=out, top_k=64, out=str(tmp_path / "p.zarr"))
    pairs = Pairs(str(tmp_path / "p.zarr"))
    rows, scores = pairs.text_rows(0, 20), pairs.scores(0, 20)
    assert (rows == -1).any()
    np.testing.assert_array_equal(np.isnan(scores), rows == -1)
    assert counts.mean_score == pytest.approx(float(np.nanmean(scores.astype(np.float64))), abs=1e-4)
    assert int(pairs.hits().sum()) == int((rows >= 0).sum())


def test_swapped_stores_are_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    retrieved(images[0], texts[0], tmp_path)
    with pytest.raises(MismatchError, match="holds text embeddings where image embeddings belong"):
        retrieve(texts[0].path, images[0].path, index=str(tmp_path / "t.index"), top_k=4, out=str(tmp_path / "q"))


def test_images_and_sentences_that_are_not_finite_or_zero_are_skipped_and_counted(tmp_path: Path) -> None:
    """A store from elsewhere may hold such rows although their status is OK."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 16)).astype(np.float16)
    broken = values.copy()
    broken[3], broken[7, 2], broken[9, 0] = 0, np.nan, np.inf
    images, _ = random_store(tmp_path / "i.zarr", rows=64, shard_rows=32, values=broken)
    texts, _ = random_store(tmp_path / "t.zarr", rows=64, shard_rows=32, kind="text", values=broken)
    sidecar = build_index(IndexConfig(store=texts.path, out=str(tmp_path / "t.index")))
    assert (sidecar.rows, sidecar.skipped) == (61, 3)
    for index in (str(tmp_path / "t.index"), None):
        out = str(tmp_path / f"{index is None}.zarr")
        counts = retrieve(images.path, texts.path, index=index, top_k=8, out=out, device="cpu")
        assert (counts.images, counts.skipped) == (61, 3)
        rows = Pairs(out).text_rows(0, 64)
        assert (rows[[3, 7, 9]] == -1).all()
        assert not np.isin(rows, [3, 7, 9]).any()
        assert np.isfinite(Pairs(out).scores(0, 64)[rows >= 0]).all()
    assert '"NOT_FINITE": 3' in (tmp_path / "True.zarr" / "commits" / "000000.json").read_text()


def test_two_runs_on_one_store_at_once_are_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    from dimefm.system.lock import writing

    with writing(str(tmp_path / "p.zarr")), pytest.raises(StoreError, match="is being written by"):
        retrieved(images[0], texts[0], tmp_path, exact=True)


def test_shards_without_a_commit_are_written_anew_whatever_is_in_them(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    """The last is not a full one: zarr would read what is in it first. The hits of a corpus have such a shard too."""
    whole = retrieved(images[0], texts[0], tmp_path, exact=True)
    files = [path for name in ("text_row", "score", "hits") for path in (tmp_path / "p.zarr" / name / "c").rglob("*")]
    files = [path for path in files if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(before[path][:-1] + bytes([before[path][-1] ^ 1]))
    for commit in (tmp_path / "p.zarr" / "commits").iterdir():
        commit.unlink()
    again = retrieved(images[0], texts[0], tmp_path, exact=True)
    assert {path: path.read_bytes() for path in files} == before
    assert again.hit_counts() == whole.hit_counts()


@pytest.mark.parametrize("array", ["text_row", "score", "hits"])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_pairs_that_are_damaged_are_not_read(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, array: str, damage: str
) -> None:
    retrieved(images[0], texts[0], tmp_path, exact=True)
    file = next(path for path in sorted((tmp_path / "p.zarr" / array / "c").rglob("*")) if path.is_file())
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
    pairs = Pairs(str(tmp_path / "p.zarr"))
    reads = {"text_row": lambda: pairs.text_rows(0, 90), "score": lambda: pairs.scores(0, 90), "hits": pairs.hits}
    with pytest.raises(StoreError, match="is missing" if damage == "missing" and array != "hits" else "is damaged"):
        reads[array]()
