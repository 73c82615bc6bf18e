"""Pages of selections and indexes: they show what the documents say, and nothing in a sentence is more than text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas.document import CHECKSUM, digest_of
from dimefm.errors import OutputExistsError, StoreError
from dimefm.pages.report import report
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.retrieve import write_pairs
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.store.embedding_store import Store
from tests.pages.browser import Browser
from tests.pages.test_page import HOSTILE, INERT
from tests.stores import random_store


@pytest.fixture(scope="module")
def selection(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("selection")
    search, pairs = ExactSearch(text_store), str(out / "p.zarr")
    write_pairs(image_store, text_store, search, index="exact", index_digest="e", top_k=3, out=pairs)
    select_texts(SelectionConfig(pairs=pairs, out=str(out / "s"), by="hits", size=40))
    return out / "s"


def write_signed(path: Path, document: dict[str, Any]) -> None:
    body = {name: value for name, value in document.items() if name != CHECKSUM}
    path.write_text(json.dumps({**body, CHECKSUM: digest_of(body)}))


def test_a_selection_shows_what_was_kept_and_what_was_not(browser: Browser, selection: Path, tmp_path: Path) -> None:
    found = json.loads((selection / "selection.json").read_text())
    browser.open(Path(report([str(selection)], str(tmp_path / "page.html"))))

    assert f"{found['kept']:,}" in browser.texts("tbody td:nth-child(3)")
    titles = browser.texts("figcaption")
    assert {"What became of the sentences", "Share kept of each source", "Sentences by hits"} <= set(titles)
    kept_at_random = [one["text"] for one in found["examples"] if one["group"] == "kept, at random"]
    assert kept_at_random[0] in browser.one("main").text


def test_a_sentence_that_is_html_is_shown_as_it_is(browser: Browser, selection: Path, tmp_path: Path) -> None:
    document = selection / "selection.json"
    before = document.read_text()
    found = json.loads(before)
    for one in found["examples"]:
        one["text"] = one["file"] = HOSTILE
    found["sources"][0]["file"] = HOSTILE
    write_signed(document, found)
    try:
        browser.open(Path(report([str(selection)], str(tmp_path / "page.html"))))
    finally:
        document.write_text(before)

    assert INERT in browser.texts("td")
    assert browser.run("return document.scripts.length") == 1


def test_an_index_shows_the_searches_that_were_tried(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store, _ = random_store(
        tmp_path / "t.zarr", rows=3000, shard_rows=1024, kind="text", values=rng.standard_normal((3000, 16))
    )
    config = IndexConfig(store=store.path, out=str(tmp_path / "t.index"), factory="IVF64,Flat", recall_target=0.9)
    build_index(config)
    (recall,) = read_sidecar(str(tmp_path / "t.index")).recall
    browser.open(Path(report([str(tmp_path / "t.index")], str(tmp_path / "page.html"))))

    rows = [row.text.split() for row in browser.all("tbody tr")]
    assert [int(row[1]) for row in rows] == [one.probes for one in recall.tried]
    assert len(rows) > 2
    assert [row[-1] for row in rows].count("chosen") == 1
    chosen = next(row for row in rows if row[-1] == "chosen")
    assert int(chosen[1]) == (recall.search_parameters or {})["nprobe"]
    assert len(browser.all("polyline")) == 1


def test_an_older_index_shows_what_is_known(browser: Browser, tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=300, shard_rows=128, kind="text")
    build_index(IndexConfig(store=store.path, out=str(tmp_path / "t.index")))
    document = tmp_path / "t.index" / "index.json"
    found = json.loads(document.read_text())
    for one in found["recall"]:
        del one["tried"]
    write_signed(document, found)
    browser.open(Path(report([str(tmp_path / "t.index")], str(tmp_path / "page.html"))))

    assert len(browser.all("tbody tr")) == 1
    assert "before all that were tried were kept" in browser.one("main").text


def test_only_a_page_of_ours_is_written_over(image_store: Store, tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(OutputExistsError, match=r"mine\.html exists and is not a page of dimefm's"):
        report([image_store.path], str(other))
    assert other.read_text() == "<p>mine</p>"
    with pytest.raises(OutputExistsError):
        report([image_store.path], str(tmp_path))
    with pytest.raises(StoreError, match="does not exist"):
        report([str(tmp_path / "gone")], str(tmp_path / "page.html"))
    with pytest.raises(StoreError, match="is a file, and report describes folders"):
        report([str(other)], str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()
    page = report([image_store.path], str(tmp_path / "page.html"))
    assert report([image_store.path], page) == page
