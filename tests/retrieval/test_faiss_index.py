"""Building an index: its recall, its parts, and what comes of stops, damage, other settings and added rows."""

import dataclasses
import json
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from cache_schemas import Recall, Status
from dimefm.commands.options import parse_bytes
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, RecallError, StoreError
from dimefm.retrieval.build_index import IndexConfig, build_index, preview_build
from dimefm.retrieval.choose_index import breakeven_queries, plan_index
from dimefm.retrieval.faiss_index import FaissIndex, _lent_to_gpus
from dimefm.retrieval.index_build import sample_rows
from dimefm.retrieval.index_merge import ListMerge
from dimefm.retrieval.index_parts import PartTask, build_part
from dimefm.retrieval.index_search import IndexSearch, SearchParameters
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.open_search import note_search
from dimefm.retrieval.recall import RecallQueries, tune
from dimefm.store.embedding_store import Store
from dimefm.system.machine import available_memory
from tests.stores import brute_force, random_store

FAILED = (5, 1500)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "t.zarr", rows=3000, shard_rows=512, kind="text", failed=FAILED, seed=1)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Store, np.ndarray]:
    return random_store(tmp_path / "i.zarr", rows=90, shard_rows=32, failed=(3, 40), seed=2)


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to measure a recall by."""
    monkeypatch.setattr("dimefm.retrieval.recall.QUERIES", 100)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one shard of 512 rows."""
    monkeypatch.setattr("dimefm.retrieval.choose_index._PART_ROWS", (512, 512))


def config_for(store: Store, tmp_path: Path, **changes: object) -> IndexConfig:
    given: dict[str, object] = {"store": store.path, "out": str(tmp_path / "t.index"), "recall_target": 0.8}
    return IndexConfig(**(given | changes))  # type: ignore[arg-type]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def index_bytes(out: str) -> bytes:
    return (Path(out) / read_sidecar(out).file).read_bytes()


# -- what is built ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "lists"),
    [
        (None, False),
        ("IVF16,Flat", True),
        ("IVF16,SQfp16", True),
        ("IVF16,PQ8x4fs", True),
        pytest.param("RR16,IVF16,PQ8x4", True, marks=pytest.mark.slow),
        pytest.param("PQ8x4", False, marks=pytest.mark.slow),
        ("HNSW16", False),
    ],
)
def test_an_index_reaches_the_recall_in_its_sidecar(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path, factory: str | None, lists: bool
) -> None:
    store, values = texts
    config = config_for(store, tmp_path, factory=factory, queries=images[0].path)
    sidecar = build_index(config)
    assert (sidecar.rows, sidecar.skipped, sidecar.factory) == (2998, 2, factory or "Flat")
    assert [r.source for r in sidecar.recall] == ["image", "text"]
    assert sidecar.recall[0].value >= 0.8
    assert ("nprobe" in sidecar.search_parameters) == lists
    index, queries = IndexSearch.open(config.out), images[1][[0, 1, 2, 4, 5]].astype(np.float32)
    scores, rows = index.search(queries, 10)
    expected = brute_force(values, queries, 10, FAILED)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), expected.tolist(), strict=True)])
    assert recall >= 0.7
    true = np.take_along_axis(queries @ values.astype(np.float32).T, rows, 1)
    np.testing.assert_allclose(scores, true, atol=2e-3)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize(
    "factory", ["IVF16,SQ8", "IVF16,PQ8x4fs", pytest.param("PQ8x4", marks=pytest.mark.slow), "Flat"]
)
def test_parts_merged_are_the_index_built_at_once(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    whole = config_for(texts[0], tmp_path, factory=factory, out=str(tmp_path / "whole.index"))
    build_index(whole)
    monkeypatch.setattr("dimefm.retrieval.choose_index._PART_ROWS", (512, 512))
    built: list[PartTask] = []

    def backwards(_: object, parts: Sequence[PartTask], say: object) -> Iterator[Any]:
        for part in reversed(parts):
            built.append(part)
            yield part, build_part(part)

    apart = config_for(texts[0], tmp_path, factory=factory, out=str(tmp_path / "parts.index"))
    build_index(apart, backwards)
    assert [part.rows for part in built] == [440, 512, 512, 512, 512, 512]
    if "fs" in factory or factory in ("PQ8x4", "Flat"):  # in another order, or with padding that FAISS leaves as it was
        every = SearchParameters(16 if "IVF" in factory else 0, 1)
        one, other = (IndexSearch.open(out).search_with(every, texts[1][:99], 9) for out in (apart.out, whole.out))
        np.testing.assert_array_equal(one, other)
    else:
        assert index_bytes(apart.out) == index_bytes(whole.out)
    assert sorted(p.name for p in Path(apart.out).iterdir() if p.name[0] != ".") == sorted(
        [read_sidecar(apart.out).file, "index.json"]
    )


def test_the_training_rows_are_drawn_from_everywhere(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=4096, shard_rows=512, kind="text", failed=(7,))
    values = sample_rows(store, 1000, seed=3)
    everything = store.read(0, 4096).astype(np.float32)
    rows = [int(np.flatnonzero((everything == value).all(axis=1))[0]) for value in values[::10]]
    counts, _ = np.histogram(rows, bins=8, range=(0, 4096))
    assert (counts >= 3).all(), "some shard gave too few"
    assert np.array_equal(values, sample_rows(store, 1000, seed=3))
    assert not np.array_equal(values, sample_rows(store, 1000, seed=4))


def test_an_index_over_one_row_can_be_built(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=1, shard_rows=16, kind="text")
    assert build_index(config_for(store, tmp_path)).rows == 1


def test_a_store_without_any_embedding_is_refused(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=4, shard_rows=16, failed=(0, 1, 2, 3))
    with pytest.raises(StoreError, match="none of its 4 images has an embedding"):
        build_index(config_for(store, tmp_path))


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("Nonsense", "--factory Nonsense: could not parse"),
        ("IVF99999,Flat", "--factory IVF99999,Flat has 99,999 centroids, more than the 2,998 training rows"),
        ("IVF0,Flat", "--factory IVF0,Flat has no centroid"),
        ("IVF4,PQ8x12", r"PQ8x12 takes 4,096 points to train on, more than the 2,998 training rows[^@]*of 4 bits"),
        ("HNSW16,PQ8x12", "PQ8x12 takes 4,096 points to train on, more than the 2,998 training rows"),
        ("IVF4(PQ8x4),Flat", "takes 16 points to train on, more than the 4 points that it has"),
        ("PQ7", "the number after PQ does not divide[^@]*the embeddings are 16 wide: take one of 2, 4, 8, 16"),
        ("PCA32,Flat", r"PCA32,Flat makes 32 dimensions of vectors that are 16 wide[^@]*16 or fewer after PCA"),
        ("LSH", "for Euclidean distances alone"),
        ("NSG16", "FAISS cannot add rows: NSG does not support incremental addition"),
    ],
)
def test_a_factory_that_cannot_be_built_is_refused(
    texts: tuple[Store, np.ndarray], tmp_path: Path, factory: str, what: str
) -> None:
    with pytest.raises(StoreError, match=what):
        build_index(config_for(texts[0], tmp_path, factory=factory))
    assert not (tmp_path / "t.index" / "index.json").exists()


def test_a_factory_that_takes_more_rows_than_there_are_is_refused(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=12, shard_rows=16, kind="text")
    for factory, needed in (("PCA16,Flat", "takes 16 rows"), ("PQ8", "takes 256 points"), ("OPQ8,Flat", "takes 256")):
        with pytest.raises(StoreError, match=f"{needed}[^@]*more than the 12 training rows[^@]*or none: one is chosen"):
            build_index(config_for(store, tmp_path, factory=factory))


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[faiss.Index]:
    """A FAISS that sees a GPU, whose memory is this machine's; the copies that were put there."""
    copies = list[faiss.Index]()

    def copied(index: faiss.Index) -> faiss.Index:
        copies.append(faiss.clone_index(index))
        return copies[-1]

    monkeypatch.setattr("faiss.get_num_gpus", lambda: 1)
    monkeypatch.setattr("dimefm.retrieval.faiss_index._on_gpus", copied)
    return copies


@pytest.mark.usefixtures("small_parts")
def test_gpus_train_and_assign_and_are_not_written(
    texts: tuple[Store, np.ndarray], tmp_path: Path, lent: list[faiss.Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed to see that what would lie on one is used, and put back before the file is written."""
    fast = config_for(texts[0], tmp_path, factory="IVF16,SQ8", out=str(tmp_path / "fast.index"))
    build_index(fast)
    assert len(lent) == 2 + 6, "for the training, for the spread of the lists, for each part"
    assert all(copy.thisown for copy in lent), "a copy that Python does not own is never freed"
    monkeypatch.setattr("faiss.get_num_gpus", lambda: 0)
    plain = config_for(texts[0], tmp_path, factory="IVF16,SQ8", out=str(tmp_path / "plain.index"))
    build_index(plain)
    assert index_bytes(fast.out) == index_bytes(plain.out)


def test_what_was_on_gpus_is_freed_once_and_the_index_stays_whole(lent: list[faiss.Index]) -> None:
    """Each copy here is 4 MB: 40 of them that nobody frees are seen in the memory of this process."""
    vectors = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
    index = faiss.index_factory(256, "IVF4096,Flat", faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(vectors)
    index.is_trained = True

    def lend(times: int) -> None:
        for _ in range(times):
            with FaissIndex(index)._lists_on_gpus():
                assert index.quantizer.this == lent[0].this
            with _lent_to_gpus(index, "clustering_index", index.quantizer):
                assert index.clustering_index.this == lent[1].this
            lent.clear()

    lend(2)
    before = resident_bytes()
    lend(20)
    assert resident_bytes() - before < 40e6
    assert index.own_fields, "the index still frees its own centroids"
    assert index.clustering_index is None
    index.add(vectors)
    index.nprobe = 4096
    assert index.search(vectors[:9], 1)[1][:, 0].tolist() == list(range(9))


def test_a_copy_is_freed_where_the_work_on_it_fails(lent: list[faiss.Index]) -> None:
    index = faiss.index_factory(4, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(np.eye(4, dtype=np.float32)[:2])
    own = index.quantizer.this
    with pytest.raises(ZeroDivisionError), FaissIndex(index)._lists_on_gpus():
        raise ZeroDivisionError
    assert lent[0].thisown
    assert index.quantizer.this == own


def test_a_gpu_with_too_little_memory_is_named(
    texts: tuple[Store, np.ndarray], tmp_path: Path, lent: list[faiss.Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(index: faiss.Index) -> faiss.Index:
        said = "StandardGpuResources: alloc fail type FlatData dev 0 (cudaMalloc error out of memory [2])"
        raise RuntimeError(f"Error in allocMemory at StandardGpuResources.cpp:638: Error: 'false' failed: {said}")

    monkeypatch.setattr("dimefm.retrieval.faiss_index._on_gpus", full)
    with pytest.raises(StoreError, match=r"too little memory on a GPU: alloc fail(?s:.*)CUDA_VISIBLE_DEVICES="):
        build_index(config_for(texts[0], tmp_path, factory="IVF16,SQ8"))


def test_a_part_leaves_the_gpus_alone_where_it_has_none(
    texts: tuple[Store, np.ndarray], tmp_path: Path, lent: list[faiss.Index]
) -> None:
    def here(_: object, parts: Sequence[PartTask], say: object) -> Iterator[Any]:
        lent.clear()
        for part in parts:
            yield part, build_part(part, use_gpus=False)
        assert not lent

    build_index(config_for(texts[0], tmp_path, factory="IVF16,SQ8"), here)


@pytest.mark.gpu
@pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS sees no GPU")
def test_building_on_gpus_leaves_nothing_on_them(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    import torch

    index = FaissIndex.from_factory("IVF16,SQ8", 16)
    index.train(np.ascontiguousarray(texts[1][100:1400], np.float32), 0)
    free = []
    for _ in range(4):
        index.add_rows(texts[0], [(0, 512)])
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[0]
    sidecar = build_index(config_for(texts[0], tmp_path, factory="IVF16,SQ8"))
    assert sidecar.recall[0].value >= 0.8


# -- recall -----------------------------------------------------------------------------------------------------------


def test_an_index_below_its_target_is_not_kept_unless_accepted(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    config = config_for(texts[0], tmp_path, factory="PQ1x4", recall_target=1.0)
    with pytest.raises(RecallError, match=r"PQ1x4 reaches recall@10 0\.\d+ for text queries, 0\.\d+ below 1\.0"):
        build_index(config)
    assert not (tmp_path / "t.index" / "index.json").exists()
    build_index(dataclasses.replace(config, accept=True))
    assert IndexSearch.open(config.out)
    assert read_sidecar(config.out).recall[0].value < 1.0


class Gauge:
    """An index whose recall is known for all parameters: how many of the ten nearest it gives."""

    def __init__(self, found: dict[tuple[int, int], int]) -> None:
        self.found, self.asked, self.clock = found, list[SearchParameters](), 0.0

    def probes(self) -> list[int]:
        return sorted({p for p, _ in self.found})

    def search_with(
        self, parameters: SearchParameters, queries_QD: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(parameters)
        rows = np.where(np.arange(k) < self.found[parameters.probes, parameters.rescore], np.arange(k), 99)
        self.clock += parameters.probes * parameters.rescore
        return np.zeros((1, k)), rows[None]


def test_the_cheapest_setting_that_reaches_the_target_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = RecallQueries("text", np.zeros((1, 2)), np.array([-1]), np.arange(11, 0, -1.0)[None], np.arange(11)[None])
    gauge = Gauge({(1, 1): 3, (2, 1): 5, (4, 1): 7, (8, 1): 8, (1, 5): 4, (2, 5): 8, (4, 5): 9, (8, 5): 10})
    monkeypatch.setattr("dimefm.retrieval.recall.time", SimpleNamespace(perf_counter=lambda: gauge.clock))

    def tuned(target: float) -> tuple[int, int, float]:
        found = tune(gauge, (1, 5), queries, target)
        assert found.search_parameters
        assert found.rescore
        return found.search_parameters["nprobe"], found.rescore, found.value

    assert tuned(0.8) == (8, 1, 0.8)
    assert tuned(0.9) == (4, 5, 0.9)
    assert tuned(1.1) == (8, 5, 1.0)
    assert SearchParameters(1, 1) not in gauge.asked, "no need to try what more candidates have ruled out"

    flat = Gauge({(1 << power, 5): min(power + 3, 7) for power in range(12)})
    monkeypatch.setattr("dimefm.retrieval.recall.time", SimpleNamespace(perf_counter=lambda: flat.clock))
    found = tune(flat, (5,), queries, 0.9)
    assert (found.search_parameters, found.value) == ({"nprobe": 16}, 0.7), "the fewest lists that find as much"
    assert max(one.probes for one in flat.asked) == 64, "more lists find no more"


def test_rows_that_tie_with_the_tenth_count_and_a_query_does_not_find_itself() -> None:
    scores = np.array([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]])
    queries = RecallQueries("text", np.zeros((1, 2)), np.array([0]), scores, np.arange(11)[None])
    exact = np.arange(11)[None]
    assert queries.recall(scores, exact) == 1.0
    other = exact.copy()
    other[0, 10] = 77  # ties with row 9 and 10
    assert queries.recall(scores, other) == 1.0
    other[0, 1] = 78
    assert queries.recall(np.where(other == 78, 0.95, scores), other) == 0.9


def test_each_kind_of_query_is_tuned_and_searched_with_its_own_parameters(
    texts: tuple[Store, np.ndarray],
    images: tuple[Store, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_for(texts[0], tmp_path, factory="IVF16,PQ4x4fs", queries=images[0].path)
    sidecar = build_index(config)
    assert [(one.source, one.value >= 0.8) for one in sidecar.recall] == [("image", True), ("text", True)]
    image, text = (sidecar.search_of(kind) for kind in ("image", "text"))
    assert (image.search_parameters, image.rescore) == (sidecar.search_parameters, sidecar.rescore)
    index = IndexSearch.open(config.out)
    for kind, tuned in (("image", image), ("text", text)):
        assert tuned.search_parameters
        assert tuned.queries_per_second
        assert index.of_kind(kind)._parameters == SearchParameters(
            tuned.search_parameters["nprobe"], tuned.rescore or 0
        )
    note_search(config.out, ["image", "text"])
    said = capsys.readouterr().err
    assert re.search(
        r"image queries: nprobe \d+, .*recall@10 0\.\d+ over \d+ queries, .*queries/s when it was tuned\n", said
    )
    assert "text queries: nprobe" in said


def test_another_kind_than_the_first_may_stay_below_the_target(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is kept at its best, and named: an index that is good for images must not fail for its sentences."""
    values = {"image": 0.9, "text": 0.7}

    def tuned(index: object, depths: object, queries: RecallQueries, target: float) -> Recall:
        of_kind = {"search_parameters": {"nprobe": 3}, "rescore": 10, "queries_per_second": 5.0}
        return Recall(k=10, queries=9, source=queries.source, value=values[queries.source], **of_kind)  # type: ignore[arg-type]

    monkeypatch.setattr("dimefm.retrieval.index_build.tune", tuned)
    images, _ = random_store(tmp_path / "i.zarr", rows=9, shard_rows=9)
    config = config_for(texts[0], tmp_path, factory="IVF16,SQ8", queries=images.path)
    assert [one.value for one in build_index(config).recall] == [0.9, 0.7]
    assert "IVF16,SQ8 reaches recall@10 0.700 for text queries, 0.100 below 0.8\n" in capsys.readouterr().err
    values["image"] = 0.79
    with pytest.raises(RecallError, match=r"reaches recall@10 0\.790 for image queries, 0\.010 below 0\.8"):
        build_index(dataclasses.replace(config, out=str(tmp_path / "other.index")))


def test_a_kind_that_was_not_tuned_is_searched_as_the_first(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    """In sidecars of older releases all others, which have their recall alone."""
    sidecar = build_index(config_for(texts[0], tmp_path, factory="IVF16,SQ8"))
    (text,) = sidecar.recall
    assert sidecar.search_of("image") == text
    older = Recall(k=10, queries=1000, source="image", value=0.96), Recall(k=10, queries=1000, source="text", value=0.8)
    old = dataclasses.replace(
        sidecar, recall=older, search_parameters={"nprobe": 7}, rescore=20, queries_per_second=9.0
    )
    assert old.search_of("text") == dataclasses.replace(older[1], search_parameters={"nprobe": 7}, rescore=20)
    assert old.search_of("image").queries_per_second == 9.0


# -- again ------------------------------------------------------------------------------------------------------------


def test_building_again_does_nothing_and_other_settings_are_refused(
    texts: tuple[Store, np.ndarray], images: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    config = config_for(texts[0], tmp_path)
    sidecar = build_index(config)
    before = (tmp_path / "t.index" / sidecar.file).stat().st_mtime_ns
    assert build_index(config) == sidecar
    assert (tmp_path / "t.index" / sidecar.file).stat().st_mtime_ns == before
    for changes, difference in (
        ({"factory": "IVF16,Flat"}, "factory: Flat != IVF16,Flat"),
        ({"recall_target": 0.7}, "recall_target: 0.8 != 0.7"),
        ({"seed": 1}, "seed: 0 != 1"),
        ({"queries": images[0].path}, "queries"),
    ):
        with pytest.raises(OutputExistsError, match=difference):
            build_index(dataclasses.replace(config, **changes))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stop", ["training", "a part", "merging", "publishing"])
def test_a_build_goes_on_where_it_was_stopped(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    undisturbed = config_for(texts[0], tmp_path, factory="IVF16,SQ8", out=str(tmp_path / "undisturbed.index"))
    build_index(undisturbed)
    config, done = config_for(texts[0], tmp_path, factory="IVF16,SQ8"), list[str]()

    def three_parts(_: object, parts: Sequence[PartTask], say: object) -> Iterator[Any]:
        for part in parts[:3]:
            yield part, build_part(part)
        raise KeyboardInterrupt

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "publishing":
            patch.setattr("dimefm.retrieval.index_build.storage.write_json", _but_the_sidecar)
        elif stop == "training":
            patch.setattr(FaissIndex, "train", interrupted)
        elif stop == "merging":
            patch.setattr(ListMerge, "_joined", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_index(config, *([three_parts] if stop == "a part" else []))
    with pytest.raises(StoreError, match="is not a dimefm index"):
        IndexSearch.open(config.out)

    def counting(_: object, parts: Sequence[PartTask], say: object) -> Iterator[Any]:
        for part in parts:
            done.append(part.file)
            yield part, build_part(part)

    build_index(config, counting)
    assert len(done) == {"training": 6, "a part": 3, "merging": 0, "publishing": 0}[stop]
    assert index_bytes(config.out) == index_bytes(undisturbed.out)
    assert len(list((tmp_path / "t.index").glob("*.faiss"))) == 1
    assert not (tmp_path / "t.index" / "build").exists()


def _but_the_sidecar(path: str, value: object) -> None:
    if path.endswith("index.json"):
        raise KeyboardInterrupt
    Path(path).write_text(json.dumps(value))


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_is_not_whole_is_built_again(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(texts[0], tmp_path, factory="PQ1x4", recall_target=1.0)
    with pytest.raises(RecallError):
        build_index(config)
    parts = sorted((tmp_path / "t.index" / "build").glob("part-*.faiss"))
    assert len(parts) == 6
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    flipped = bytearray(parts[1].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    parts[1].write_bytes(flipped)
    parts[2].with_suffix(".json").write_text("{")
    done = list[str]()

    def counting(_: object, pending: Sequence[PartTask], say: object) -> Iterator[Any]:
        for part in pending:
            done.append(part.file)
            yield part, build_part(part)

    build_index(dataclasses.replace(config, accept=True), counting)
    assert sorted(done) == [part.name for part in parts[:3]]
    assert read_sidecar(config.out).rows == 2998


def _write_again(store: Store, shard: int, values: np.ndarray) -> None:
    start, stop = store.schema.shard_range(shard)
    arrays = {"embedding": values[start:stop], "status": np.full(stop - start, Status.OK, np.uint8)}
    store.write_shard(shard, arrays, [], device="cpu", seconds=1.0)


@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "IVF16,PQ16x4fs", "Flat"])
def test_rows_that_a_store_gets_later_are_added(tmp_path: Path, factory: str) -> None:
    """An unfinished store first; then its other shards, and a row that had failed."""
    store, values = random_store(tmp_path / "t.zarr", rows=3000, shard_rows=512, kind="text", failed=(5,), seed=1)
    commits = sorted((tmp_path / "t.zarr" / "commits").iterdir())
    for commit in commits[3:]:
        shutil.move(commit, tmp_path / commit.name)
    config = config_for(store, tmp_path, factory=factory)
    with pytest.raises(StoreError, match="is unfinished: 3 of 6 shards are done"):
        build_index(config)
    first = build_index(dataclasses.replace(config, partial=True))
    assert (first.rows, first.skipped, sorted(first.shards)) == (1535, 1, ["0", "1", "2"])
    for commit in commits[3:]:
        shutil.move(tmp_path / commit.name, commit)
    with pytest.raises(StoreError, match=r"lacks 3 shards of .* that were written since"):
        IndexSearch.open(config.out)
    second = build_index(config)
    assert (second.rows, second.train_rows, len(second.shards)) == (2999, first.train_rows, 6)

    values[5] = values[6]
    _write_again(store, 0, values)
    with pytest.raises(StoreError, match="lacks 1 shard of"):
        IndexSearch.open(config.out)
    third = build_index(config)
    assert (third.rows, third.skipped) == (3000, 0)
    _, rows = IndexSearch.open(config.out).search(values[[5, 700, 2900]].astype(np.float32), 4)
    assert {5, 6} <= set(rows[0].tolist())
    assert rows[1:, 0].tolist() == [700, 2900]
    assert all(len(set(found)) == 4 for found in rows.tolist()), "a row is in the index twice"
    assert [p.name for p in (tmp_path / "t.index").glob("index-*")] == [third.file]


def test_a_graph_cannot_be_added_to_and_says_so(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "t.zarr", rows=600, shard_rows=512, kind="text", failed=(5,), seed=1)
    config = config_for(store, tmp_path, factory="HNSW16")
    before = build_index(config)
    values[5] = values[6]
    _write_again(store, 0, values)
    with pytest.raises(StoreError, match="HNSW16, to which nothing can be added"):
        build_index(config)
    assert read_sidecar(config.out) == before


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_damaged_index_is_refused(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    config = config_for(texts[0], tmp_path)
    file = tmp_path / "t.index" / build_index(config).file
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(StoreError, match=r"has .* bytes, its sidecar says"):
        IndexSearch.open(config.out)
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(StoreError, match="its checksum does not fit"):
        IndexSearch.open(config.out)
    file.unlink()
    with pytest.raises(StoreError, match="has 0 bytes"):
        IndexSearch.open(config.out)


def test_an_index_over_another_store_is_refused(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    config = config_for(texts[0], tmp_path)
    build_index(config)
    other, _ = random_store(tmp_path / "o.zarr", rows=3000, shard_rows=512, kind="text", digest="another source")
    with pytest.raises(MismatchError, match="was built over"):
        IndexSearch.open(config.out, other)
    with pytest.raises(OutputExistsError, match="store: "):
        build_index(dataclasses.replace(config, store=other.path))


def test_queries_of_another_teacher_are_refused(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    stranger, _ = random_store(tmp_path / "w.zarr", rows=64, shard_rows=32, weights="another teacher")
    with pytest.raises(MismatchError, match=r"teacher.weights"):
        build_index(config_for(texts[0], tmp_path, queries=stranger.path))
    assert not (tmp_path / "t.index").exists()


def test_a_folder_of_something_else_is_left_alone(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "t.index").mkdir()
    (tmp_path / "t.index" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"it holds 'thesis.tex'"):
        build_index(config_for(texts[0], tmp_path))
    assert (tmp_path / "t.index" / "thesis.tex").read_text() == "years of work"


def test_a_sidecar_of_another_version_is_refused_with_the_remedy(
    texts: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    build_index(config_for(texts[0], tmp_path))
    path = tmp_path / "t.index" / "index.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 9}))
    with pytest.raises(ValueError, match="version 9 is not readable here"):
        IndexSearch.open(str(tmp_path / "t.index"))


# -- the plan ---------------------------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("rows", "memory", "factory"),
    [
        (100_000, 12 * GB, "Flat"),
        (500_000, 12 * GB, "IVF2048,PQ384x4fs"),
        (28_400_000, 12 * GB, "IVF16384,PQ384x4fs"),
        (28_400_000, 20 * GB, "IVF16384,PQ384x4fs"),
        (28_400_000, 5 * GB, "IVF16384,PQ192x4fs"),
        (28_400_000, 3 * GB, "IVF8192,PQ96x4fs"),
        (100_000_000, 128 * GB, "IVF262144_HNSW32,PQ384x4fs"),
    ],
)
def test_the_factory_follows_rows_and_memory(rows: int, memory: int, factory: str) -> None:
    plan = plan_index(rows, 768, memory)
    assert plan.factory == factory
    assert plan.bytes < memory
    assert plan.train_rows * 768 * 4 < memory


def test_codes_divide_the_width_whatever_it_is() -> None:
    for dim in range(1, 300):
        factory = plan_index(200_000, dim, 10**10).factory
        assert dim % int(factory.split("PQ")[1].removesuffix("x4fs")) == 0
    assert plan_index(200_000, 768, 10**10).factory == "IVF1024,PQ384x4fs"


def test_a_factory_that_is_given_is_taken_as_it_is() -> None:
    assert plan_index(50, 16, GB, "IVF7,PQ4x4fs,Refine(Flat)").factory == "IVF7,PQ4x4fs,Refine(Flat)"


def test_too_little_memory_is_refused_before_anything_is_built() -> None:
    with pytest.raises(DimefmError, match=r"fits into 1\.2 GB: the smallest takes 2\.8 GB"):
        plan_index(28_400_000, 768, 1_200_000_000)


@pytest.mark.parametrize("factory", ["PQ8x4", "IVF16,PQ8x4fs", "HNSW16"])
def test_an_index_that_must_be_in_memory_and_will_not_fit_is_refused_before_it_is_trained(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    config = config_for(texts[0], tmp_path, factory=factory, memory=700_030_000)
    monkeypatch.setattr(FaissIndex, "train", None)
    refused = (
        rf"{factory} over 3,000 rows must be in memory to be searched, and takes 700\.\d MB; --memory is 700\.0 MB"
    )
    with pytest.raises(StoreError, match=refused):
        build_index(config)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "RR16,IVF16,SQ8"])
def test_lists_that_stay_in_their_file_need_no_memory_and_are_cut_into_smaller_parts(
    texts: tuple[Store, np.ndarray], tmp_path: Path, factory: str
) -> None:
    parts = list[PartTask]()

    def counting(_: object, pending: Sequence[PartTask], say: object) -> Iterator[Any]:
        for part in pending:
            parts.append(part)
            yield part, build_part(part)

    config = config_for(texts[0], tmp_path, factory=factory, memory=700_030_000)
    assert build_index(config, counting).rows == 2998
    assert len(parts) == 6, "a part of all rows would take more"


@pytest.fixture(scope="module")
def big_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A trained index, and four parts of it with 6 MB each."""
    folder = tmp_path_factory.mktemp("parts")
    index = FaissIndex.from_factory("IVF32,Flat", 256)
    vectors = np.random.default_rng(0).standard_normal((24000, 256), np.float32)
    index.train(vectors[:2000], 0)
    index.write(folder / "trained.faiss")
    parts = []
    for at in range(0, 24000, 6000):
        part = FaissIndex.read(folder / "trained.faiss")
        part.inner.add_with_ids(vectors[at : at + 6000], np.arange(at, at + 6000))
        parts.append(folder / f"part-{at}.faiss")
        part.write(parts[-1])
    return folder, parts


def test_merging_holds_neither_the_parts_nor_the_whole_in_memory(
    big_parts: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, parts = big_parts
    monkeypatch.setattr("dimefm.retrieval.index_merge._SLICE", 2 * 10**6)
    trained, merged = FaissIndex.read(folder / "trained.faiss"), folder / "merged.faiss"
    ListMerge(trained).write(parts[:1], merged)  # which brings FAISS's own code and threads into memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes()
    ListMerge(trained).write(parts, merged)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    assert int(peak[1]) * 1024 - before < 15e6, "the whole takes 25 MB"
    at_once = FaissIndex.read(parts[0])
    for part in parts[1:]:
        at_once.merge(FaissIndex.read(part))
    at_once.write(folder / "at-once.faiss")
    assert merged.read_bytes() == (folder / "at-once.faiss").read_bytes()


@pytest.mark.parametrize("sizes", [(64, 64, 7), (64, 64, 64), (65, 63, 64), (128, 1, 63), (3, 61)], ids=str)
def test_rows_are_added_to_lists_whose_size_faiss_cannot_add_to(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """A block of this index has 64 bytes: FAISS writes beyond a list of 64 rows, or 128, that gets more."""
    vectors = np.random.default_rng(0).standard_normal((2000, 16), np.float32)
    trained = FaissIndex.from_factory("IVF1,PQ4x4fs", 16)
    trained.train(vectors, 0)
    trained.write(tmp_path / "trained.faiss")
    ivf = faiss.extract_index_ivf(trained.inner)
    assert faiss.downcast_InvertedLists(ivf.invlists).block_size == 64
    parts, at = [], 0
    for size in sizes:
        part = FaissIndex.read(tmp_path / "trained.faiss")
        part.inner.add_with_ids(vectors[at : at + size], np.arange(at, at + size))
        parts.append(tmp_path / f"part-{at}.faiss")
        part.write(parts[-1])
        at += size
    ListMerge(trained).write(parts, tmp_path / "merged.faiss")
    merged, at_once = FaissIndex.read(tmp_path / "merged.faiss"), FaissIndex.read(tmp_path / "trained.faiss")
    at_once.inner.add_with_ids(vectors[:at], np.arange(at))
    assert merged.rows == at
    assert codes_by_id(merged) == codes_by_id(at_once)


def codes_by_id(index: FaissIndex) -> dict[int, bytes]:
    """The code of every row of an index of one list."""
    ivf = faiss.extract_index_ivf(index.inner)
    lists, packer = faiss.downcast_InvertedLists(ivf.invlists), ivf.get_CodePacker()
    found = {}
    for place in range(lists.list_size(0)):
        code = np.empty(packer.code_size, np.uint8)
        packer.unpack_1_c(lists.get_codes(0), place, faiss.swig_ptr(code))
        found[lists.get_single_id(0, place)] = code.tobytes()
    return found


def test_a_part_of_another_index_is_not_merged(big_parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, parts = big_parts
    other = tmp_path / "other.faiss"
    FaissIndex.from_factory("IVF16,Flat", 256).write(other)
    cut = tmp_path / "cut.faiss"
    cut.write_bytes(parts[1].read_bytes()[:-8])
    for wrong in (other, cut):
        with pytest.raises(StoreError, match=f"{wrong.name} is not a part of this index, or is damaged"):
            ListMerge(FaissIndex.read(folder / "trained.faiss")).write([parts[0], wrong], tmp_path / "merged.faiss")
    assert not (tmp_path / "merged.faiss").exists()


def test_the_forecast_says_when_exact_search_is_cheaper(texts: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    plan = plan_index(500_000, 512, 12 * GB)
    breakeven = breakeven_queries(500_000, plan)
    assert breakeven == round(2048 * (1 + 10 * 131_072 / 500_000))
    config = config_for(texts[0], tmp_path, factory="IVF16,Flat", queries=texts[0].path)
    expected = preview_build(config)
    assert (expected.breakeven, expected.exact_is_cheaper) == (176, False)
    assert (
        "up to 176 queries take less work than the building; for the 3,000 of --queries, build it" in expected.advice()
    )
    assert not preview_build(dataclasses.replace(config, queries=None)).exact_is_cheaper
    config = dataclasses.replace(config, factory="IVF512,Flat")
    assert preview_build(config).exact_is_cheaper
    assert "exact search is cheaper: dimefm retrieve without --index" in preview_build(config).advice()
    assert not (tmp_path / "t.index").exists()


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("12GB", "1.5 gb", "800MB", "4096")] == [
        12 * GB,
        15 * GB // 10,
        8 * 10**8,
        4096,
    ]
    for wrong in ("", "GB", "12 bananas", "12GBs", "0", "-5GB", "nanGB", "infGB", "0.1"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(wrong)
    assert available_memory() > 10**8


def test_candidates_are_scored_again_within_little_memory_and_at_once_alike(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(texts[0], tmp_path, factory="IVF16,PQ8x4fs")
    build_index(config)
    index, queries = IndexSearch.open(config.out), texts[1][:200].astype(np.float32)
    parameters = SearchParameters(4, 20)
    at_once = index.search_with(parameters, queries, 9)
    monkeypatch.setattr("dimefm.retrieval.index_search._RESCORE_BYTES", 16 * 4 * 200)
    monkeypatch.setattr("dimefm.retrieval.index_search._RESCORE_QUERIES", 33)
    scores, rows = index.search_with(parameters, queries, 9)
    np.testing.assert_allclose(scores, at_once[0], atol=1e-6)
    assert (rows == at_once[1]).mean() > 0.99
    true = np.take_along_axis(queries @ texts[1].astype(np.float32).T, rows, 1)
    np.testing.assert_allclose(scores[rows >= 0], true[rows >= 0], atol=1e-6)
    assert (rows >= 0).mean() > 0.9


def test_lists_are_chosen_by_what_their_best_row_may_score(tmp_path: Path) -> None:
    """Half of the lists are wide: of as many probed, those that are chosen so hold more of the nearest rows than those
    with the nearest centroids, for queries unlike any row."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((32, 32))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    width = np.where(np.arange(32) % 2, 0.25, 0.02)
    chosen = rng.integers(32, size=6000)
    rows = centres[chosen] + rng.standard_normal((6000, 32)) * width[chosen, None]
    store, values = random_store(
        tmp_path / "t.zarr", rows=6000, shard_rows=2048, kind="text", values=rows, embed_dim=32
    )
    config = config_for(store, tmp_path, factory="IVF32,Flat", recall_target=0.5)
    sidecar = build_index(config)
    assert sidecar.spread
    queries = rng.standard_normal((200, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    expected = brute_force(values, queries, 10, ())

    def found(spread: str, probes: int) -> np.ndarray:
        index = FaissIndex.read(tmp_path / "t.index" / sidecar.file, spread)
        return IndexSearch(index, store, SearchParameters(probes, 1)).search(queries, 10)[1]

    recalls = [
        np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found(spread, 6).tolist(), expected.tolist(), strict=True)])
        for spread in ("", sidecar.spread)
    ]
    assert recalls[1] > recalls[0] + 0.03
    every = found(sidecar.spread, 32)
    assert (np.sort(every, axis=1) == np.sort(expected, axis=1)).mean() > 0.99


def test_what_it_was_built_from_is_removed_or_an_error_and_removed_by_the_next_run(
    texts: tuple[Store, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = IndexConfig(store=texts[0].path, out=str(tmp_path / "t.index"), accept=True)

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refused)
        with pytest.raises(PermissionError, match="build"):
            build_index(config)
    assert (tmp_path / "t.index" / "build").exists()
    build_index(config)
    assert sorted(path.name[:6] for path in (tmp_path / "t.index").iterdir()) == ["index-", "index."]
