"""The visually grounded corpus: scores and choices against plain NumPy, and what a run leaves on disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cache_schemas import SchemaError
from cache_schemas.text_selection import SELECTED_ROWS
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, SelectionError, StoreError, TrainingError
from dimefm.inspection.info import describe
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.retrieve import write_pairs
from dimefm.selection import grounding, members, repetitions
from dimefm.selection.clusters import capped, cluster, cluster_count
from dimefm.selection.grounding import Grounding, score_by_grounding
from dimefm.selection.narrow import Outcome
from dimefm.selection.report import source_file
from dimefm.selection.select_texts import SelectionConfig, best_cosines, select_texts
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from dimefm.training.config import LossConfig, TextMix
from dimefm.training.run_folder import read_run
from dimefm.training.text_bank import TextBank
from dimefm.training.train import train
from tests.processes import Command, Gate
from tests.stores import random_store
from tests.tiny_training import tiny_config

pytest_plugins = ["tests.s3"]

IMAGES, TEXTS, SHARD = 120, 600, 128
FAILED, BROKEN = (7, 300), (8, 450)
THINGS = 6


class World:
    """Images of six things; sentences of which every third is about one of them, in a narrow cone as text encoders have
    it, and the others are nearer to the mean image than any. A few rows without an embedding, or a broken one."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(3)
        thing = np.eye(16)[:THINGS]
        images = thing[rng.integers(THINGS, size=IMAGES)] + 0.1 * rng.standard_normal((IMAGES, 16))
        self.visual = np.arange(TEXTS) % 3 == 0
        about = 0.5 * thing[rng.integers(THINGS, size=TEXTS)]
        other = 1.3 * thing.sum(axis=0) + np.pad(0.5 * rng.standard_normal((TEXTS, 4)), ((0, 0), (12, 0)))
        texts = np.where(self.visual[:, None], about, other) + 1.5 * np.eye(16)[10]
        texts += 0.05 * rng.standard_normal(texts.shape)
        keys = [f"{'visual' if v else 'nonvisual'}_a.txt:{row}" for row, v in enumerate(self.visual)]
        values = texts / np.linalg.norm(texts, axis=1, keepdims=True)
        values[BROKEN[0]] = np.nan
        values[BROKEN[1]] = values[0]  # to the very last bit
        self.images, self.image_values = random_store(
            folder / "i.zarr", rows=IMAGES, shard_rows=32, values=images, failed=(3,)
        )
        self.texts, self.values = random_store(
            folder / "t.zarr", rows=TEXTS, shard_rows=SHARD, kind="text", values=values, keys=keys, failed=FAILED
        )
        self.gone = (*FAILED, BROKEN[0])
        self.there = np.setdiff1d(np.arange(TEXTS), self.gone)
        search, self.pairs = ExactSearch(self.texts), str(folder / "p.zarr")
        write_pairs(
            self.images, self.texts, search, index="exact", index_digest="e", top_k=5, out=self.pairs
        )  # fmt: skip

    def select(self, out: Path, **changes: Any) -> SelectedTexts:
        select_texts(
            SelectionConfig(**{"pairs": self.pairs, "out": str(out), "by": "similarity", "device": "cpu", **changes})
        )
        return SelectedTexts(str(out))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def scored(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection by similarity, whose scores others take."""
    return Path(world.select(tmp_path_factory.mktemp("scored") / "s.selection", size=100).path)


def files(folder: Path | str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.name[0] != "."
            and p.is_file()}  # fmt: skip


def test_only_a_selection_that_computes_loads_torch_and_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.select(tmp_path / "a.selection", size=100)
    assert capsys.readouterr().err.startswith(f"{TEXTS:,} sentences: loading torch ...\n")
    world.select(tmp_path / "b.selection", by="hits", device=None)
    assert "loading torch" not in capsys.readouterr().err


def formula(world: World) -> np.ndarray:
    """Grounding's docstring in float64 over all images and sentences."""
    images = np.delete(world.image_values, 3, axis=0).astype(np.float64)
    cosine = world.values[world.there].astype(np.float64) @ images.T
    z = (cosine - cosine.mean(axis=0)) / cosine.std(axis=0)
    nearest = len(images) // 16
    top = np.sort(z, axis=1)[:, -nearest:].mean(axis=1)
    score = np.full(TEXTS, np.nan)
    score[world.there] = (top - z.mean(axis=1)) / z.std(axis=1)
    return score


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1024])
def test_a_score_is_its_formula_whatever_the_block(
    world: World, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grounding, "_BLOCK", block)
    score_T = score_by_grounding(world.images, world.texts, str(tmp_path), count=1000, seed=0, device="cpu")
    np.testing.assert_allclose(score_T, formula(world), rtol=1e-3)
    assert np.flatnonzero(np.isnan(score_T)).tolist() == sorted(world.gone)


def test_scores_tell_what_images_show_where_the_best_cosine_does_not(world: World, scored: Path) -> None:
    """Sentences near the mean image are near every image."""
    rows = SelectedTexts(str(scored)).rows()
    assert world.visual[rows].all()
    cosine_T = (world.values.astype(np.float32) @ world.image_values.astype(np.float32).T).max(axis=1)
    cosine_T[np.isnan(cosine_T)] = -1
    assert world.visual[np.argsort(-cosine_T)[:100]].mean() < 0.5


def test_a_sample_of_images_is_drawn_by_the_seed_and_of_that_size(world: World) -> None:
    one, again, other = (Grounding.sample(world.images, world.texts, 40, seed=seed, device="cpu") for seed in (0, 0, 1))
    assert one.scaled_DM.shape == (16, 40)
    assert torch.equal(one.scaled_DM, again.scaled_DM)
    assert not torch.equal(one.scaled_DM, other.scaled_DM)


def test_one_image_is_too_few_to_score_by(world: World, tmp_path: Path) -> None:
    images, _ = random_store(tmp_path / "i.zarr", rows=2, shard_rows=16, failed=(1,))
    with pytest.raises(SelectionError, match="has 1 images with an embedding; a score takes two"):
        score_by_grounding(images, world.texts, str(tmp_path / "o"), count=10, seed=0, device="cpu")


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_are_those_that_were_planted_and_the_same_each_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planted = np.arange(100) % 10
    values = np.eye(16)[planted] + 0.02 * rng.standard_normal((100, 16))
    store, _ = random_store(tmp_path / "t.zarr", rows=100, shard_rows=64, kind="text", values=values)
    assert cluster_count(100) == 10
    label_C = cluster(store, np.arange(100), str(tmp_path / "a"), seed=1, device="cpu")
    again_C = cluster(store, np.arange(100)[::-1], str(tmp_path / "b"), seed=1, device="cpu")[::-1]
    assert label_C.tolist() == again_C.tolist()
    assert all(len(set(label_C[planted == thing])) <= 2 for thing in range(10))
    assert len(set(zip(label_C.tolist(), planted.tolist(), strict=True))) <= 12  # k-means may halve one or two


def naive_repetitions(values: np.ndarray, rows: np.ndarray, labels: np.ndarray, limit: float) -> np.ndarray:
    unit = values.astype(np.float32) / np.linalg.norm(values.astype(np.float32), axis=1, keepdims=True)
    dropped = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        better = [j for j in range(i) if not dropped[j] and labels[j] == labels[i]]
        dropped[i] = any(unit[row] @ unit[rows[j]] >= limit for j in better)
    return dropped


@pytest.mark.parametrize("block", [3, 16, 2048])
@pytest.mark.parametrize("held", [0, 1 << 20])
def test_repetitions_are_those_of_a_better_kept_one_in_the_cluster(
    tmp_path: Path, block: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the members of a cluster fit into memory, and whatever the unit of the work."""
    monkeypatch.setattr(repetitions, "_BLOCK", block)
    monkeypatch.setattr(repetitions, "_UNIT", 3 * block)
    monkeypatch.setattr(members, "_MOST_HELD", held)
    store, values = random_store(tmp_path / "t.zarr", rows=200, shard_rows=64, kind="text", seed=4)
    rows = np.random.default_rng(0).permutation(200)[:180]
    folder = str(tmp_path / "clusters")
    label_C = cluster(store, rows, folder, seed=0, device="cpu", copies=True)
    assert len(set(label_C.tolist())) > 5
    like_C = repetitions.repetitions(store, rows, label_C, folder, 0.4, device="cpu")
    dropped = naive_repetitions(values, rows, label_C, 0.4)
    np.testing.assert_array_equal(like_C >= 0, dropped)
    assert 20 < dropped.sum() < 160
    place = {row: i for i, row in enumerate(rows.tolist())}
    for i in np.flatnonzero(dropped):
        twin = place[int(like_C[i])]
        assert twin < i
        assert not dropped[twin]
        assert values[rows[i]].astype(np.float32) @ values[rows[twin]].astype(np.float32) > 0.399


@pytest.mark.parametrize("size", [1, 37, 150, 199, 200, 500])
def test_the_cap_is_the_smallest_that_fills_the_size(size: int) -> None:
    label_C = np.random.default_rng(5).geometric(0.2, size=200)
    inside_C, cap = capped(label_C, size)
    counts = np.bincount(label_C)
    assert inside_C.sum() == min(size, 200)
    assert np.minimum(counts, cap).sum() >= min(size, 200)
    assert np.minimum(counts, cap - 1).sum() < min(size, 200)
    for label in np.unique(label_C):  # within a cluster, the best
        mine = inside_C[label_C == label]
        assert not (np.diff(mine.astype(int)) > 0).any()
        assert cap - 1 <= mine.sum() <= cap or mine.all()


# -- choices ----------------------------------------------------------------------------------------------------------


def test_by_hits_are_the_most_retrieved_and_of_equals_the_nearest(world: World, tmp_path: Path) -> None:
    pairs = Pairs(world.pairs)
    rows_NK, scores_NK = pairs.text_rows(0, IMAGES), pairs.scores(0, IMAGES).astype(np.float32)
    best = {row: scores_NK[rows_NK == row].max() for row in np.unique(rows_NK[rows_NK >= 0]).tolist()}
    hits = {row: int((rows_NK == row).sum()) for row in best}
    ranked = sorted(best, key=lambda row: (-hits[row], -best[row], row))
    assert world.select(tmp_path / "all", by="hits", device=None).rows().tolist() == sorted(best)
    size = next(n for n in range(15, 60) if hits[ranked[n - 1]] == hits[ranked[n]] and ranked[n - 1] > ranked[n])
    some = world.select(tmp_path / "some", by="hits", size=size, device=None)
    assert some.rows().tolist() == sorted(ranked[:size])
    table = pq.read_table(Path(some.path) / "rows.parquet")
    assert table["hits"].to_pylist() == [hits[row] for row in sorted(ranked[:size])]
    np.testing.assert_allclose(table["score"].to_numpy(), [best[row] for row in sorted(ranked[:size])])


def test_every_condition_counts_what_it_leaves_out(world: World, scored: Path, tmp_path: Path) -> None:
    score_T, hits_T = formula(world), Pairs(world.pairs).hits()
    border = float(np.sort(score_T[world.there])[-250])
    found = world.select(
        tmp_path / "s", scores=str(scored), min_score=border - 1e-4, pool=200, dedup=0.9995, balance=True, size=40
    ).document
    dropped = found.dropped
    assert dropped["without an embedding"] == 3
    assert dropped["below --min-score"] == TEXTS - 3 - 250
    assert dropped["beyond --pool"] == 50
    assert found.kept == 40
    assert dropped["repeated, by --dedup"] + dropped["above the cap of their cluster, by --balance"] == 160
    assert found.clusters == cluster_count(200)
    few = world.select(tmp_path / "f", by="hits", min_hits=3, device=None)
    assert few.rows().tolist() == np.flatnonzero(hits_T >= 3).tolist()
    # Where hits are needed, embeddings are not read: the one that is NaN, though its status is OK, counts as one
    # without a hit.
    assert few.document.dropped["without an embedding"] == len(FAILED)
    assert few.document.dropped["with fewer hits than --min-hits"] == TEXTS - len(FAILED) - len(few.rows())


def test_a_sentence_with_the_same_embedding_is_left_out_and_shown_with_its_twin(
    world: World, scored: Path, tmp_path: Path
) -> None:
    found = world.select(tmp_path / "s", scores=str(scored), dedup=0.9999)
    assert 0 in found.rows()
    assert BROKEN[1] not in found.rows()
    (example,) = (e for e in found.document.examples if e.group == "dropped, repeated")
    assert (example.row, example.like) == (BROKEN[1], "sentence 0")


def test_a_disk_without_room_for_the_copies_is_named_before_they_are_made(
    world: World, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(StoreError, match=r"clusters: --dedup copies .* GB there until it is done, and 0.0 GB are free"):
        world.select(tmp_path / "s", scores=str(scored), dedup=0.9999)
    assert not list(tmp_path.rglob("members/*"))
    monkeypatch.undo()
    assert world.select(tmp_path / "s", scores=str(scored), dedup=0.9999).rows().tolist()


def test_balance_brings_in_more_clusters_than_the_ranking_alone(world: World, scored: Path, tmp_path: Path) -> None:
    label_T = np.full(TEXTS, -1)
    label_T[world.there] = cluster(world.texts, world.there, str(tmp_path / "clusters"), seed=0, device="cpu")
    plain = world.select(tmp_path / "p", scores=str(scored), size=60).rows()
    even = world.select(tmp_path / "b", scores=str(scored), size=60, pool=190, balance=True).rows()
    assert len(plain) == len(even) == 60
    most = [np.bincount(label_T[rows]).max() for rows in (plain, even)]
    assert most[1] < most[0]


def test_a_draw_is_that_of_the_seed_and_can_be_among_given_rows(world: World, tmp_path: Path) -> None:
    one, again, other = (
        world.select(tmp_path / name, by="random", size=50, seed=seed, device=None).rows().tolist()
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert one == again != other
    assert not set(one) & set(world.gone)
    config = SelectionConfig(pairs=world.pairs, out=str(tmp_path / "d"), by="random", size=50)
    found = select_texts(config, np.flatnonzero(world.visual))
    assert world.visual[SelectedTexts(config.out).rows()].all()
    assert found.dropped["not among the rows given"] == int((~world.visual[world.there]).sum())
    with pytest.raises(OutputExistsError, match="among: "):
        select_texts(config, np.arange(100))


def test_nothing_left_is_an_error_that_says_why(world: World, scored: Path, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="no sentence is left:") as caught:
        world.select(tmp_path / "s", scores=str(scored), min_score=1e6)
    reasons = "\n  - 3: without an embedding\n  - 597: a score below 1000000.0 (--min-score)\n"
    assert reasons in str(caught.value)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"by": "hits", "images_sample": 5}, "--images-sample has no effect without --by similarity"),
        ({"by": "hits", "seed": 5}, "--seed has no effect without --by similarity, --by random, --dedup or --balance"),
        ({"by": "hits", "device": "cpu"}, "--device has no effect without"),
        ({"by": "random", "size": 5, "scores": "x"}, "--scores has no effect without --by similarity"),
        ({"by": "random", "size": 5, "images": "x"}, "--images has no effect without --by similarity"),
        ({"size": 5, "pool": 9}, "--pool has no effect without --dedup or --balance"),
        ({"min_hits": 2, "balance": True}, "--balance has no effect without --size"),
        ({"size": 5, "pool": 5, "balance": True}, "--balance has no effect: a --pool of 5 leaves --size 5 no choice"),
        ({"size": 5, "balance": True}, "--balance over the whole store takes from every cluster"),
        ({}, "nothing says what to leave out"),
        ({"size": 0}, "--size must be 1 or more, found 0"),
        ({"dedup": 1.0}, "--dedup must lie between 0 and 1"),
        ({"min_score": float("nan")}, "--min-score must be a number, found nan"),
    ],
)
def test_settings_without_effect_are_refused(words: dict[str, Any], what: str) -> None:
    with pytest.raises(SelectionError, match=what.replace("(", r"\(")):
        SelectionConfig(**{"pairs": "p.zarr", "out": "o", "by": "similarity", **words})


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_kept(world: World, scored: Path) -> None:
    selected = SelectedTexts(str(scored))
    rows = selected.rows().tolist()
    table = pq.read_table(scored / "rows.parquet")
    assert table.schema.equals(SELECTED_ROWS)
    assert table["row"].to_pylist() == rows == sorted(rows)
    assert table["text"].to_pylist() == [f"sentence {row}" for row in rows]
    assert (scored / "sentences.txt").read_text() == "".join(f"sentence {row}\n" for row in rows)
    np.testing.assert_allclose(table["score"].to_numpy(), formula(world)[rows], rtol=1e-3)
    document = selected.document
    assert {s.file: (s.rows, s.kept) for s in document.sources} == {
        "visual_a.txt": (int(world.visual.sum()), 100),
        "nonvisual_a.txt": (int((~world.visual).sum()), 0),
    }
    assert document.histogram is not None
    assert (sum(document.histogram.kept), sum(document.histogram.dropped)) == (100, TEXTS - 3 - 100)
    text = (scored / "report.md").read_text()
    assert "# 100 of 600 sentences" in text
    assert "| visual_a.txt | 200 | 100 | 50.0% | 100.0% |" in text
    for example in document.examples:
        assert example.text in text
    last = [e.score for e in document.examples if e.group == "kept, the last"]
    best_out = [e.score for e in document.examples if e.group == "dropped, the best"]
    assert min(s for s in last if s is not None) >= max(s for s in best_out if s is not None)


@pytest.mark.parametrize(
    ("key", "file"),
    [("a.txt.gz:17", "a.txt.gz"), ("b:c.csv:2", "b:c.csv"), ("cifar10/3/0", "cifar10"), ("plain", ""), ("", "")],
)
def test_the_file_of_a_sentence_is_in_its_key(key: str, file: str) -> None:
    assert source_file(key) == file


@pytest.mark.parametrize(
    "words",
    [
        {"size": 70, "min_hits": 1, "dedup": 0.97, "balance": True},
        {"by": "hits", "dedup": 0.9, "size": 20},
        {"by": "random", "size": 30, "device": None},
    ],
)
def test_twice_is_the_same_bytes(world: World, tmp_path: Path, words: dict[str, Any]) -> None:
    one, other = (world.select(tmp_path / name, **words).path for name in ("one", "other"))
    assert files(one) == files(other)
    assert len(files(one)) >= 5


def test_again_does_nothing_and_other_settings_are_refused_by_name(world: World, scored: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in scored.rglob("*") if path.name[0] != "." and path.is_file()}
    world.select(scored, size=100)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(OutputExistsError, match=r"another command .*:\n  - size: 100 != 101\n  - seed: 0 != 3"):
        world.select(scored, size=101, seed=3)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(OutputExistsError, match=r"not a selection \(it holds 'chapter.tex'\)"):
        world.select(tmp_path / "thesis", size=5)


def test_a_stopped_run_goes_on_and_scores_no_finished_shard_again(
    world: World, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], Grounding.scores

    def stop_at_third(self: Grounding, embedding_ND: np.ndarray) -> np.ndarray:
        calls.append(len(embedding_ND))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, embedding_ND)

    monkeypatch.setattr(Grounding, "scores", stop_at_third)
    out = tmp_path / "s.selection"
    with pytest.raises(KeyboardInterrupt):
        world.select(out, size=100)
    assert "2 of 5 shards done" in describe(str(out))
    with pytest.raises(StoreError, match="is unfinished"):
        SelectedTexts(str(out))
    with pytest.raises(OutputExistsError, match="size: 100 != 90"):
        world.select(out, size=90)
    world.select(out, size=100)
    assert len(calls) == 6, "a finished shard was scored again"
    assert files(out) == files(scored)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 20])
def test_sigkill_and_the_same_command_give_the_same_bytes(world: World, tmp_path: Path, after: int) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=960, shard_rows=16, kind="text", seed=9)
    pairs = str(tmp_path / "p.zarr")
    write_pairs(
        world.images, texts, ExactSearch(texts), index="exact", index_digest="e", top_k=5, out=pairs
    )  # fmt: skip
    words = ["select-texts", pairs, "--by", "similarity", "--size", "50", "--dedup", "0.9", "--out"]
    killed, whole, gate = tmp_path / "killed", tmp_path / "whole", Gate(tmp_path / "gate")
    gate.close(at=f"os.rename */scores/{after:06d}*")
    Command([*words, str(killed)], gate).kill_when(gate.waiting)
    assert len(list(killed.glob("scores/0*"))) == after
    assert not (killed / "selection.json").exists()
    for out in (killed, whole):
        Command([*words, str(out)]).finish()
    assert files(killed) == files(whole)


def test_a_selection_on_s3_is_the_one_on_disk(world: World, scored: Path, s3: str) -> None:
    url = f"{s3}/s.selection"
    found = select_texts(SelectionConfig(pairs=world.pairs, out=url, by="similarity", size=100, device="cpu"))
    assert {name: storage.read_bytes(f"{url}/{name}") for name in storage.tree(url)} == files(scored)
    assert SelectedTexts(url).rows().tolist() == SelectedTexts(str(scored)).rows().tolist()
    assert select_texts(SelectionConfig(pairs=world.pairs, out=url, by="similarity", size=100, device="cpu")) == found
    assert "100 of 600 sentences" in describe(url)


def test_damaged_scores_are_made_again(world: World, scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.selection"
    shutil.copytree(scored, out)
    (out / "selection.json").unlink()
    file = out / "scores" / "000001"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    (out / "scores" / "000002").write_bytes(b"")
    world.select(out, size=100)
    assert files(out) == files(scored)


def test_a_damaged_selection_is_refused(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.selection"
    shutil.copytree(scored, out)
    data = bytearray((out / "rows.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "rows.parquet").write_bytes(data)
    with pytest.raises(StoreError, match=r"rows.parquet is damaged: its checksum does not fit"):
        SelectedTexts(str(out)).rows()
    (out / "rows.parquet").unlink()
    with pytest.raises(StoreError, match=r"rows.parquet is missing"):
        SelectedTexts(str(out)).rows()
    document = json.loads((out / "selection.json").read_text())
    (out / "selection.json").write_text(json.dumps({**document, "kept": 99}))
    with pytest.raises(SchemaError, match="kept"):
        SelectedTexts(str(out))
    with pytest.raises(StoreError, match="is not a selection"):
        SelectedTexts(str(tmp_path / "nowhere"))


def test_scores_of_another_selection_are_taken_if_they_are_the_same(
    world: World, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(self: Grounding, embedding_ND: np.ndarray) -> np.ndarray:
        raise AssertionError("scored again")

    expected = world.select(tmp_path / "own", size=80).rows()
    monkeypatch.setattr(Grounding, "scores", scores)
    np.testing.assert_array_equal(world.select(tmp_path / "a", size=80, scores=str(scored)).rows(), expected)
    with pytest.raises(MismatchError, match="images_sample: 16384 != 50"):
        world.select(tmp_path / "b", size=80, scores=str(scored), images_sample=50)
    by_hits = world.select(tmp_path / "hits", by="hits", device=None).path
    with pytest.raises(MismatchError, match="by: hits != similarity"):
        world.select(tmp_path / "c", size=80, scores=by_hits)


def test_moved_stores_are_found_and_other_stores_refused(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(world.texts.path, moved)
    found = world.select(tmp_path / "a", by="hits", size=9, texts=str(moved), device=None).document
    assert found.plan.texts == str(moved)
    other, _ = random_store(tmp_path / "o.zarr", rows=TEXTS, shard_rows=SHARD, kind="text", digest="other")
    with pytest.raises(MismatchError, match="was retrieved over other texts than"):
        world.select(tmp_path / "b", by="hits", size=9, texts=other.path, device=None)
    images, _ = random_store(tmp_path / "x.zarr", rows=9, shard_rows=16, digest="other")
    with pytest.raises(MismatchError, match="was retrieved over other images than"):
        world.select(tmp_path / "c", size=9, images=images.path)
    with pytest.raises(MismatchError, match="holds text embeddings where image"):
        world.select(tmp_path / "c", size=9, images=world.texts.path)


def test_info_says_how_many_of_which_file(scored: Path) -> None:
    text = describe(str(scored))
    assert "100 of 600 sentences, 16.7%" in text
    assert "by similarity, size 100, scored against 16,384 images, seed 0" in text
    assert "visual_a.txt: 100 of 200, 50.0%" in text


def test_best_cosines_are_the_largest_of_the_pairs(world: World) -> None:
    best_T = best_cosines(Pairs(world.pairs))
    np.testing.assert_array_equal(np.isnan(best_T), Pairs(world.pairs).hits() == 0)


def test_outcomes_are_numbered_in_the_order_of_the_conditions() -> None:
    assert [outcome.name for outcome in Outcome] == sorted(
        (fate.name for fate in Outcome), key=lambda name: Outcome[name]
    )
    assert Outcome.KEPT == 0


# -- training ---------------------------------------------------------------------------------------------------------


def test_selected_texts_are_drawn_from_the_selection_alone(world: World, scored: Path) -> None:
    selected = SelectedTexts(str(scored))
    bank = TextBank(world.texts, TextMix(random=0, selected=1), None, selected, seed=0, total=2000)
    rows = bank.rows(0, np.arange(4))
    assert set(rows.tolist()) == set(selected.rows().tolist())
    mix = TextMix(random=0, selected=0.5, retrieved=0.5)
    both = TextBank(world.texts, mix, Pairs(world.pairs), selected, seed=0, total=2000)
    rows = both.rows(0, np.array([0]))
    assert set(rows[:1000].tolist()) <= set(selected.rows().tolist())
    assert set(rows[1000:].tolist()) <= set(Pairs(world.pairs).text_rows(0, 1)[0].tolist())
    with pytest.raises(TrainingError, match="selected texts need --selection or --pairs"):
        TextBank(world.texts, TextMix(random=0, selected=1), None, seed=0, total=8)


@pytest.fixture(scope="module")
def real(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and two selections over the real stores that training reads."""
    out = tmp_path_factory.mktemp("real")
    search = ExactSearch(text_store)
    write_pairs(
        image_store, text_store, search, index="exact", index_digest="e", top_k=4, out=str(out / "p.zarr")
    )  # fmt: skip
    for name, size in (("a", 60), ("b", 61)):
        select_texts(
            SelectionConfig(pairs=str(out / "p.zarr"), out=str(out / name), by="similarity", size=size, device="cpu")
        )
    return out


def test_a_student_is_trained_on_a_selection_and_resumes_only_on_the_same(
    image_store: Store, text_store: Store, world: World, scored: Path, real: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "run", selection=str(real / "a"), text_mix=TextMix(random=0, selected=1),
        loss=LossConfig(), max_steps=2,
    )  # fmt: skip
    assert train(config).steps == 2
    assert read_run(config.out).selection_digest == SelectedTexts(str(real / "a")).document.digest
    shutil.copytree(real / "a", tmp_path / "moved")
    assert train(replace(config, selection=str(tmp_path / "moved"))).steps == 2
    with pytest.raises(MismatchError, match="selection_digest: "):
        train(replace(config, selection=str(real / "b")))
    with pytest.raises(MismatchError, match="other sentences than those of"):
        train(replace(config, selection=str(scored), out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    with pytest.raises(TrainingError, match="a selection is given, but the text mix draws nothing from it"):
        replace(config, text_mix=TextMix())
    with pytest.raises(TrainingError, match="pairs are given, but neither the text mix nor the loss draws from them"):
        replace(config, pairs=str(real / "p.zarr"))


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(world: World, tmp_path: Path) -> None:
    with pytest.raises(DimefmError, match="--device cuda: torch sees no GPU here"):
        world.select(tmp_path / "s.selection", size=5, device="cuda")
    assert not (tmp_path / "s.selection").exists()
