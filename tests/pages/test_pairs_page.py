"""Pages of pairs: what is drawn of real ones in a browser, and what is said where a store they name is not there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas import digest_of
from cache_schemas.document import CHECKSUM
from cache_schemas.embedding_store import ATTRIBUTES_KEY
from cache_schemas.pairs import HITS_COMMIT
from dimefm.images.thumbnail import thumbnail
from dimefm.inspection.info import examine
from dimefm.models.clip import Clip
from dimefm.pages import pairs_page
from dimefm.pages.pairs_page import _largest
from dimefm.pages.pictures import SIDE, as_uri
from dimefm.pages.report import report
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from pipeline.cache import CacheConfig, cache, captions_place
from tests.conftest import cached
from tests.making import make_jpeg, write_tar, write_text
from tests.pages.browser import Browser

HOSTILE = "<script>document.title=1</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"


@pytest.fixture(scope="module")
def kept(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of both stores and their pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    shutil.copytree(image_store.path, folder / "images.zarr")
    shutil.copytree(text_store.path, folder / "texts.zarr")
    out = str(folder / "pairs.zarr")
    retrieve(str(folder / "images.zarr"), str(folder / "texts.zarr"), top_k=4, out=out, device="cpu")
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """Pairs of a test's own, which name the stores in `kept` until the test says otherwise."""
    shutil.copytree(kept / "pairs.zarr", tmp_path / "pairs.zarr")
    return tmp_path


def opened(browser: Browser, folder: Path, place: Path) -> None:
    browser.open(Path(report([str(place)], str(folder / "page.html"))))


def saying(pairs: Path, **fields: str) -> None:
    """Have the document of the pairs say this instead."""
    group: dict[str, Any] = json.loads((pairs / "zarr.json").read_text())
    document = group["attributes"][ATTRIBUTES_KEY]
    rest = {name: value for name, value in document.items() if name != CHECKSUM} | fields
    group["attributes"][ATTRIBUTES_KEY] = {**rest, CHECKSUM: digest_of(rest)}
    (pairs / "zarr.json").write_text(json.dumps(group))


def test_images_stand_with_their_sentences_and_sentences_with_their_hits(browser: Browser, folder: Path) -> None:
    opened(browser, folder, folder / "pairs.zarr")

    pairs = Pairs(str(folder / "pairs.zarr"))
    images, texts = Store(pairs.schema.images), Store(pairs.schema.texts)
    score_NK, text_NK, hits_T = pairs.scores(0, 96), pairs.text_rows(0, 96), pairs.hits()
    assert browser.texts("h2") == [f"pairs.zarr: {one}" for one in ("pairs", "images", "sentences")]
    assert browser.texts(".warning") == []
    assert browser.widths("img") == [width for width in browser.widths("img") if width > 0]
    cards = browser.all(".gallery li")
    assert len(cards) == 36
    for card, place in ((cards[0], score_NK[:, 0].argmax()), (cards[12], score_NK[:, 0].argmin())):
        lines = card.text.split("\n")
        assert lines[0] == images.samples(np.array([place]))[0]["key"]
        sentences = [one["text"] for one in texts.samples(text_NK[place][:3])]
        assert [one.split(" ", 1)[0] for one in lines[1:]] == [f"{score:.3f}" for score in score_NK[place][:3]]
        assert [one.split(" ", 1)[1][:60] for one in lines[1:]] == [" ".join(one.split())[:60] for one in sentences]
    rows = [[cell.text for cell in row.find_elements("css selector", "td")] for row in browser.all("#s3 tbody tr")]
    assert [int(hits) for _, hits, _ in rows] == sorted(hits_T[hits_T > 0].tolist(), reverse=True)[:30]
    assert all(hits_T[int(row)] == int(hits) for _, hits, row in rows)
    assert rows[0][0] == texts.samples(np.array([int(rows[0][2])]))[0]["text"]
    in_bars = """return [...document.querySelectorAll('figure.chart')].map(one =>
        [...one.querySelectorAll('rect')].reduce((all, bar) => all + Number(bar.textContent.split(': ')[1]), 0))"""
    found = int((hits_T > 0).sum())
    assert browser.run(in_bars) == [96, 0, found]  # the second is the line of scores by rank
    assert f"{found} of 200 sentences are found, {found / 200:.1%}" in browser.texts(".note")[2]


def test_hostile_captions_and_keys_are_text(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    key = HOSTILE.replace("/", "!").replace(".", "!")
    tar = write_tar(tmp_path / "a.tar", {f"{key}{n}.jpg": make_jpeg(seed=n) for n in range(5)})
    images = cached("image", tar, tmp_path / "images.zarr", clip)
    texts = cached("text", write_text(tmp_path / "a.txt", [HOSTILE, "a dog"]), tmp_path / "texts.zarr", clip)
    retrieve(images.path, texts.path, top_k=2, out=str(tmp_path / "pairs.zarr"), device="cpu")
    opened(browser, tmp_path, tmp_path / "pairs.zarr")

    assert {one[:-1] for one in browser.texts(".gallery li b")} == {key}
    assert len(browser.all(".gallery li")) == 5
    assert sum(HOSTILE in one for one in browser.texts(".gallery li span")) == 5
    assert HOSTILE in browser.texts("td")
    assert browser.run("return document.scripts.length") == 1
    shown = browser.run(
        "return [...document.querySelectorAll('.gallery li')]"
        ".map(one => [one.textContent.trim(), one.querySelector('img').src])"
    )
    for words, image in shown:
        assert image == as_uri(thumbnail(make_jpeg(seed=int(words.strip()[len(key)])), SIDE))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("gone.zarr", "gone.zarr is not a dimefm store: it does not exist"),
        ("http://127.0.0.1:1/a.zarr", "http://127.0.0.1:1/a.zarr is not opened, since only the document of"),
        ("other.zarr", "other.zarr is another store than the one that"),
    ],
)
def test_what_cannot_be_opened_is_said_and_the_rest_is_shown(
    browser: Browser, folder: Path, text_store: Store, prompt_store: Store, place: str, reason: str
) -> None:
    (folder / "other.zarr").symlink_to(prompt_store.path)
    named = place if "://" in place else str(folder / place)
    saying(folder / "pairs.zarr", images=named)
    opened(browser, folder, folder / "pairs.zarr")

    (warning,) = browser.texts(".warning")
    assert warning.startswith("The pictures and keys cannot be shown, only numbers of rows: ")
    assert reason in warning
    assert all(one.startswith("row ") for one in browser.texts(".gallery li b"))
    assert browser.texts(".none") == ["no picture"] * 36
    assert " a " in browser.texts("#s3 tbody")[0]

    saying(folder / "pairs.zarr", texts=named)
    opened(browser, folder, folder / "pairs.zarr")
    assert [reason in one for one in browser.texts(".warning")] == [True, True]
    assert all(one.split(" ", 1)[1].startswith("row ") for one in browser.texts(".gallery li span"))
    assert examine(str(folder / "pairs.zarr")).facts["examples"] == []


def test_unfinished_pairs_are_shown_as_far_as_they_are(browser: Browser, folder: Path) -> None:
    (folder / "pairs.zarr" / HITS_COMMIT).unlink()
    (folder / "pairs.zarr" / "commits" / "000001.json").unlink()
    opened(browser, folder, folder / "pairs.zarr")

    assert browser.texts(".warning") == ["These pairs are unfinished: hits are counted at the end."]
    assert browser.texts("h2") == ["pairs.zarr: pairs", "pairs.zarr: images"]
    assert "of 64 of 96 images" in browser.texts(".note")[0]
    for commit in (folder / "pairs.zarr" / "commits").iterdir():
        commit.unlink()
    opened(browser, folder, folder / "pairs.zarr")
    assert browser.texts("h2") == ["pairs.zarr: pairs"]


def test_captions_stand_with_their_images(browser: Browser, teacher_name: str, tmp_path: Path) -> None:
    captions = {"a.txt": b"a red bus\na dog\n", "b.txt": "\u00e9t\u00e9".encode(), "c.txt": b"long " * 100}
    images = {f"{name}.jpg": make_jpeg(seed=n) for n, name in enumerate("abcd")}
    tar = write_tar(tmp_path / "photos.tar", dict(sorted((images | captions).items())))
    words: dict[str, Any] = {"captions": "txt", "workers": 1, "device": "cpu", "shard_rows": 4}
    config = CacheConfig(kind="image", sources=(str(tar),), out=str(tmp_path / "I.zarr"), teacher=teacher_name, **words)
    cache(config)
    opened(browser, tmp_path, Path(captions_place(config), "pairs"))

    assert browser.texts("h2")[0] == "pairs: captions"
    cards = dict(one.split("\n", 1) for one in browser.texts(".gallery li"))
    assert set(cards) == {"a", "b", "c"}  # d has no caption
    assert "a dog" in cards["a"]
    assert "a red bus" in cards["a"]
    assert "\u00e9t\u00e9" in cards["b"]
    assert cards["c"].endswith(" long long\u2026")
    assert len(browser.all("#s3 tbody tr")) == 4


def test_the_largest_are_those_of_a_whole_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_page, "_BLOCK", 16)
    value_T = np.random.default_rng(0).permutation(100).astype(np.uint32)
    np.testing.assert_array_equal(_largest(value_T, 7), np.argsort(-value_T.astype(int))[:7])
    np.testing.assert_array_equal(_largest(value_T[:5], 7), np.argsort(-value_T[:5].astype(int)))
