"""What was made from a store is told from what belongs to its data now, after rows of it were encoded again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas import Status, digest_of
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, StoreError
from dimefm.inspection.info import describe
from dimefm.retrieval import retrieve_shards
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.retrieve import retrieve
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.training.config import TextMix
from dimefm.training.run_folder import open_inputs, read_run
from dimefm.training.train import train
from tests.stores import random_store
from tests.tiny_training import tiny_config

FAILED = (3, 40)  # in the first and the second of three shards of images


def encode_again(store: Store, *rows: int) -> Store:
    """As --retry-failed does with rows that can be read now, or --repair with those of another device."""
    for row in rows:
        shard, within = divmod(row, store.schema.shard_rows)
        arrays = {name: values.copy() for name, values in store.shard_arrays(shard).items()}
        vector = np.random.default_rng(row).standard_normal(store.schema.dim)
        arrays["embedding"][within], arrays["status"][within] = vector / np.linalg.norm(vector), Status.OK
        commit = store.commit(shard)
        assert commit is not None
        failures = [failure for failure in store.failures(commit) if failure.row != row]
        store.write_shard(shard, arrays, failures, device="cpu", seconds=1)
    return Store(store.path)


def as_before(path: Path, *names: str) -> None:
    """A document as it was written before it had these fields."""
    raw = json.loads(path.read_text())
    group = path.name == "zarr.json"
    document = raw["attributes"]["dimefm"] if group else raw
    for place in (document, document.get("plan", {})):
        for name in names:
            if isinstance(place, dict):
                place.pop(name, None)
    document["checksum"] = digest_of({name: value for name, value in document.items() if name != "checksum"})
    path.write_text(json.dumps(raw))


class Made:
    """A store of images, one of texts, and what was retrieved from them and selected."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pairs, self.selection = folder, str(folder / "p.zarr"), str(folder / "t.selection")
        self.images, _ = random_store(folder / "i.zarr", rows=90, shard_rows=32, failed=FAILED, seed=2)
        self.texts, _ = random_store(folder / "t.zarr", rows=300, shard_rows=128, kind="text", failed=(5, 150), seed=1)
        self.retrieve()
        self.select()

    def retrieve(self, out: str | None = None, **words: Any) -> Pairs:
        out = out or self.pairs
        retrieve(self.images.path, self.texts.path, top_k=4, out=out, device="cpu", **words)
        return Pairs(out)

    def select(self, **words: Any) -> SelectedTexts:
        select_texts(SelectionConfig(**{"pairs": self.pairs, "out": self.selection, **words}))
        return SelectedTexts(str(words.get("out", self.selection)))

    def inputs(self, *names: str) -> None:
        """Open what a training run would read."""
        config = tiny_config(self.images, self.texts, self.folder / "run", text_mix=TextMix(random=0, selected=1))
        open_inputs(replace(config, **{name: getattr(self, name) for name in names}))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_retrieve_does_the_shards_again_whose_images_have_changed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: all commits but the second are as they were."""
    before = {path.name: path.read_bytes() for path in (tmp_path / "p.zarr" / "commits").glob("0*.json")}
    monkeypatch.setattr(retrieve_shards, "_LEAST", 32)  # images: a shard is searched alone
    searched = []
    search = ExactSearch.search
    monkeypatch.setattr(ExactSearch, "search", lambda self, *a: (searched.append(len(a[0])), search(self, *a))[1])
    made.retrieve()
    assert searched == [], "nothing had changed"
    encode_again(made.images, 40)
    again = made.retrieve()
    assert searched == [32]
    whole = made.retrieve(str(tmp_path / "whole.zarr"))
    np.testing.assert_array_equal(again.text_rows(0, 90), whole.text_rows(0, 90))
    np.testing.assert_array_equal(again.scores(0, 90), whole.scores(0, 90))
    np.testing.assert_array_equal(again.hits(), whole.hits())
    assert again.hit_counts() == whole.hit_counts()
    after = {path.name: path.read_bytes() for path in (tmp_path / "p.zarr" / "commits").glob("0*.json")}
    assert {name for name in after if after[name] != before[name]} == {"000001.json"}


def test_retrieve_that_is_stopped_between_changed_shards_is_unfinished_and_goes_on(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_again(made.images, *FAILED)
    monkeypatch.setattr(retrieve_shards, "_LEAST", 32)  # images: a shard is searched alone
    search, searched = ExactSearch.search, []

    def stop_at_second(self: ExactSearch, *arguments: Any) -> Any:
        searched.append(1)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(self, *arguments)

    monkeypatch.setattr(ExactSearch, "search", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        made.retrieve()
    with pytest.raises(StoreError, match="unfinished"):
        made.inputs("pairs")
    again = made.retrieve()
    assert len(searched) == 3, "the first shard was searched again"
    assert again.hit_counts().images == 90
    made.inputs("pairs")


@pytest.mark.parametrize("indexed", [False, True])
def test_other_texts_are_refused_by_name(made: Made, tmp_path: Path, indexed: bool) -> None:
    words = {"index": str(tmp_path / "t.index")} if indexed else {}
    out = str(tmp_path / "q.zarr")
    if indexed:
        build_index(IndexConfig(store=made.texts.path, out=words["index"]))
    made.retrieve(out, **words)
    encode_again(made.texts, 5)
    if indexed:
        with pytest.raises(StoreError, match="run the same dimefm build-index again"):
            made.retrieve(out, **words)
        build_index(IndexConfig(store=made.texts.path, out=words["index"]))
    with pytest.raises(OutputExistsError, match=r"(?s)other embeddings of \S*t.zarr than it has now:.*texts_data"):
        made.retrieve(out, **words)
    assert Pairs(out).hit_counts().images == 88, "what was there is kept"


@pytest.mark.parametrize(("store", "row"), [("images", 40), ("texts", 150)])
@pytest.mark.parametrize("name", ["pairs", "selection"])
def test_training_from_what_was_made_of_older_data_is_refused_by_name(
    made: Made, store: str, row: int, name: str
) -> None:
    made.inputs(name)
    changed = encode_again(getattr(made, store), row)
    with pytest.raises(MismatchError) as caught:
        made.inputs(name)
    for words in (getattr(made, name), changed.path, "than it has now", "retrieve"):
        assert words in str(caught.value)


def test_a_selection_by_pairs_of_other_images_is_not_compared_with_those_of_the_run(made: Made, tmp_path: Path) -> None:
    made.images, _ = random_store(tmp_path / "o.zarr", rows=50, shard_rows=32, digest="other images", seed=9)
    made.inputs("selection")


def test_selecting_from_pairs_of_older_data_is_refused(made: Made, tmp_path: Path) -> None:
    grounded = {"by": "similarity", "size": 10, "device": "cpu"}
    encode_again(made.images, 40)
    with pytest.raises(MismatchError, match=r"other embeddings of \S*i.zarr"):
        made.select(out=str(tmp_path / "s"), **grounded)
    made.retrieve()
    with pytest.raises(OutputExistsError, match="images_data: "):
        made.select()
    made.select(out=str(tmp_path / "s"), **grounded)
    encode_again(made.texts, 5)
    with pytest.raises(MismatchError, match=r"other embeddings of \S*t.zarr"):
        made.select(out=str(tmp_path / "u"))


def test_scores_of_older_data_are_not_taken(made: Made, tmp_path: Path) -> None:
    grounded = {"by": "similarity", "size": 10, "device": "cpu"}
    scored = made.select(out=str(tmp_path / "s"), **grounded)
    encode_again(made.images, 40)
    made.retrieve()
    with pytest.raises(MismatchError, match="images_data: "):
        made.select(out=str(tmp_path / "u"), **grounded, scores=scored.path)


def test_what_was_made_before_digests_were_kept_is_opened_and_gone_on_with(made: Made, tmp_path: Path) -> None:
    for path in (tmp_path / "p.zarr" / "commits").glob("0*.json"):
        as_before(path, "table", "images")
    as_before(tmp_path / "p.zarr" / "commits" / "hits.json", "images_data")
    as_before(tmp_path / "p.zarr" / "zarr.json", "texts_data")
    for name in ("plan.json", "selection.json"):
        as_before(tmp_path / "t.selection" / name, "images_data", "texts_data")
    for store in ("i.zarr", "t.zarr"):
        for path in (tmp_path / store / "commits").glob("0*.json"):
            as_before(path, "table", "images")
    before = (tmp_path / "p.zarr" / "commits" / "hits.json").read_bytes()
    encode_again(made.images, 40)
    encode_again(made.texts, 5)
    made.retrieve()
    assert (tmp_path / "p.zarr" / "commits" / "hits.json").read_bytes() == before
    made.select()
    made.inputs("pairs")
    made.inputs("selection")
    (tmp_path / "p.zarr" / "commits" / "000002.json").unlink()  # as if that release had been stopped there
    (tmp_path / "p.zarr" / "commits" / "hits.json").unlink()
    assert "2 of 3 done" in describe(made.pairs)
    assert made.retrieve().hit_counts().images_data is None
    made.inputs("pairs")


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(image_store: Store, text_store: Store, tmp_path: Path) -> tuple[Store, Store]:
    for store, name in ((image_store, "i.zarr"), (text_store, "t.zarr")):
        shutil.copytree(store.path, tmp_path / name)
    return Store(str(tmp_path / "i.zarr")), Store(str(tmp_path / "t.zarr"))


def test_a_run_whose_stores_have_new_data_goes_on_only_where_that_is_said(
    copies: tuple[Store, Store], tmp_path: Path
) -> None:
    config = tiny_config(*copies, tmp_path / "run", max_steps=2)
    train(config)
    run = read_run(config.out)
    assert (run.images_data, run.texts_data) == tuple(store.contents.digest for store in copies)
    encode_again(copies[0], 0)
    encode_again(copies[1], 0)
    longer, change = replace(config, max_steps=4), ("max_steps",)
    for command, words in ((config, ()), (longer, change), (longer, (*change, "images"))):
        with pytest.raises(MismatchError, match=r"(?s)texts_data: .*--allow-changes \S*texts") as caught:
            train(command, allow_changes=words)
        assert ("images_data" in str(caught.value)) == ("images" not in words)
    assert read_run(config.out) == run
    train(longer, allow_changes=("max_steps", "images", "texts"))
    changes = {change.field: (change.step, change.values) for change in read_run(config.out).changes}
    now = Store(copies[0].path).contents.digest
    assert changes["images_data"] == (2, f"{run.images_data} != {now}")
    assert "texts_data" in changes
    train(longer)  # the same command again is no change


def test_a_run_from_before_digests_were_kept_goes_on(copies: tuple[Store, Store], tmp_path: Path) -> None:
    config = tiny_config(*copies, tmp_path / "run", max_steps=2)
    train(config)
    as_before(tmp_path / "run" / "run.json", "images_data", "texts_data")
    encode_again(copies[0], 0)
    train(config)


def test_every_commit_is_read_once_when_a_run_begins(
    copies: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    parse: Callable[..., Any] = Store._parse_commit
    monkeypatch.setattr(
        Store,
        "_parse_commit",
        lambda self, shard, raw: (read.append(f"{self.path}/{shard}"), parse(self, shard, raw))[1],
    )
    train(tiny_config(*copies, tmp_path / "run", max_steps=1))
    assert len(read) == len(set(read)) == sum(store.schema.shards for store in copies)
    with pytest.raises(DimefmError):
        train(tiny_config(*copies, tmp_path / "run", max_steps=2))
