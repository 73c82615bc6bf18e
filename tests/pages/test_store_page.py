"""Pages of embedding stores: what is drawn of real stores, finished or not, and what is said of what cannot be."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas import Failure, Status, ViewPlan
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.images.thumbnail import thumbnail
from dimefm.models.clip import Clip
from dimefm.pages import likeness, store_page
from dimefm.pages.likeness import nearest, random_cosines
from dimefm.pages.pictures import as_uri
from dimefm.pages.report import report
from dimefm.pages.row_sample import sample_rows
from dimefm.pages.short_words import short, short_names
from dimefm.store.embedding_store import Store
from tests.conftest import cached
from tests.making import make_jpeg, write_tar, write_text
from tests.pages.browser import Browser
from tests.stores import random_store

HOSTILE = "<script>document.title=1</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
GOOD, SHARD_ROWS = 20, 8


def key(number: int) -> str:
    """A key as a tar can have it."""
    return f"{HOSTILE.replace('/', '!').replace('.', '!')}{number}"


def tar_of_images(folder: Path) -> Path:
    """Twenty pictures, and three that are none; every key is hostile."""
    members = {f"{key(n)}.jpg": make_jpeg(seed=n) for n in range(GOOD)}
    broken = {f"broken{n}.jpg": b"no image" for n in range(2)}
    return write_tar(folder / "images.tar", {**members, **broken, "empty.jpg": b""})


def opened(browser: Browser, folder: Path, *stores: Store) -> Path:
    page = Path(report([store.path for store in stores], str(folder / "page.html")))
    browser.open(page)
    return page


def shapes(browser: Browser) -> dict[str, int]:
    """How many shapes each chart has, by its title."""
    found: dict[str, int] = browser.run(
        """return Object.fromEntries([...document.querySelectorAll('figure.chart')].map(
        one => [one.querySelector('figcaption').textContent,
                one.querySelectorAll('svg rect, svg circle, svg polyline').length]))"""
    )
    return found


@pytest.fixture(scope="module")
def unfinished(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of hostile keys and of failed rows, of which one of three shards is not done."""
    folder = tmp_path_factory.mktemp("unfinished")
    request = PlanRequest(kind="image", arguments=(str(tar_of_images(folder)),), shard_rows=SHARD_ROWS, batch_size=8)
    store = open_or_plan(request, str(folder / "images.zarr"), clip.identity)
    failing = int(np.unique([row // SHARD_ROWS for row in failed_rows(store)])[0])
    for shard in sorted({failing, (failing + 1) % store.schema.shards}):
        encode_shard(store, shard, clip)
    return store


def failed_rows(store: Store) -> list[int]:
    keys = [one["key"] for one in store.samples(np.arange(store.schema.rows))]
    return [row for row, key in enumerate(keys) if key.startswith(("broken", "empty"))]


def test_an_unfinished_store_with_failures_and_hostile_keys(
    browser: Browser, unfinished: Store, tmp_path: Path
) -> None:
    opened(browser, tmp_path, unfinished)

    assert browser.texts("h2") == [f"images.zarr: {one}" for one in ("images", "embeddings", "near-duplicates")]
    assert browser.texts(".warning") == [
        "This store is unfinished: 2 of 3 shards are done. The same command goes on there."
    ]
    counts = {name: n for commit in unfinished.commits() for name, n in commit.counts.items()}
    good = sum(commit.counts.get("OK", 0) for commit in unfinished.commits())
    drawn = shapes(browser)
    assert drawn["Rows by status"] == len(counts) + 1
    assert drawn["Map of the embeddings, coloured by source"] == good
    assert drawn["Rows per second, shard by shard"] == 3  # a line, and a dot for each shard
    assert set(drawn) >= {"Norms, as stored", "Cosines of random pairs", "Cosine to the nearest other row"}
    failures = browser.texts("figure.table")[0]
    assert "UNDECODABLE" in failures or "EMPTY" in failures
    assert "dimefm info STORE --failures" in failures
    assert browser.driver.title == f"dimefm: {unfinished.path}"
    assert browser.run("return document.scripts.length") == 1
    assert "<img src=x onerror=alert(2)>{{ 7*7 }}" in browser.texts("td")[-2]
    widths = browser.widths("td img")
    assert widths
    assert min(widths) == 48


def test_the_map_shows_the_picture_at_the_pointer(browser: Browser, unfinished: Store, tmp_path: Path) -> None:
    opened(browser, tmp_path, unfinished)
    browser.hover(browser.one(".map .point"))

    assert browser.widths("#tip img") == [48]
    shown = browser.run("return [[document.querySelector('#tip').textContent, document.querySelector('#tip img').src]]")
    shown += browser.run("return [...document.querySelectorAll('.dots li')].map(o => [o.textContent, o.dataset.image])")
    shown += browser.run(
        "return [...document.querySelectorAll('td:has(img)')].map(o => [o.textContent, o.firstChild.src])"
    )
    for words, image in shown:
        number = re.fullmatch(re.escape(key(0)[:-1]) + r"(\d+) \(row \d+\)", words)
        assert number
        assert image == as_uri(thumbnail(make_jpeg(seed=int(number[1])), 96))


def test_failures_are_counted_by_reason(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    store = cached("image", tar_of_images(tmp_path), tmp_path / "s.zarr", clip, shard_rows=SHARD_ROWS)
    opened(browser, tmp_path, store)

    assert "Failures by reason: all 3; dimefm info STORE --failures lists them" in browser.texts("figcaption")
    cells = [one.text for one in browser.all("#s1 table td")]
    assert (cells[0], cells[2]) == ("UNDECODABLE", "2")
    assert cells[3].startswith("row ")
    assert {"broken0", "broken1"} <= {one.rpartition(" ")[2] for one in cells[3].split("; ")}
    assert (cells[4], cells[6]) == ("EMPTY", "1")


def test_reasons_are_the_same_but_for_files_and_numbers(
    browser: Browser, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_page, "_FAILURES", 15)
    request = PlanRequest(kind="image", arguments=(str(tar_of_images(tmp_path)),), shard_rows=32, batch_size=8)
    store = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity)
    rows = store.schema.rows
    reasons = [f"/a/{row}.tar ends after {row * 1000:,} bytes" if row % 2 else "no image" for row in range(rows)]
    failures = [Failure(row=row, key=key(row), file=f"/a/{row}.tar", status="TRUNCATED", reason=reasons[row])
                for row in range(rows)]  # fmt: skip
    arrays: dict[str, Any] = {"embedding": np.zeros((rows, store.schema.dim), np.float16)}
    arrays["status"] = np.full(rows, Status.TRUNCATED, np.uint8)
    store.write_shard(0, arrays, failures, device="cpu", seconds=0)
    opened(browser, tmp_path, store)

    assert f"Failures by reason: the first 15 of {rows}; dimefm info STORE --failures lists them" in browser.texts(
        "figcaption"
    )
    cells = [cell.text for cell in browser.all("#s1 table td")]
    assert [cells[at : at + 3] for at in (0, 4)] == [
        ["TRUNCATED", "no image", "8"], ["TRUNCATED", "… ends after … bytes", "7"]
    ]  # fmt: skip
    assert cells[3] == "; ".join(f"row {row}, {short(key(row), 60)}" for row in (0, 2, 4))
    assert list(shapes(browser)) == ["Rows by status"]  # no time, no embedding


def test_a_store_whose_images_are_gone_says_so(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    tar = tar_of_images(tmp_path)
    store = cached("image", tar, tmp_path / "s.zarr", clip, shard_rows=SHARD_ROWS)
    tar.unlink()
    opened(browser, tmp_path, store)

    asked = GOOD + 2 * len(browser.all("#s3 figure:last-of-type tbody tr"))
    (warning,) = browser.texts(".warning")
    assert warning.startswith(f"{asked} of {asked} pictures cannot be shown, such as: ")
    assert "images.tar" in warning
    assert browser.run("return document.images.length") == 0
    assert shapes(browser)["Map of the embeddings, coloured by source"] == GOOD


def test_views_have_a_norm_each_and_pixels_are_shown_without_the_source(
    browser: Browser, clip: Clip, tmp_path: Path
) -> None:
    tar = tar_of_images(tmp_path)
    views = ViewPlan(count=3, seed=0, crop_scale=(0.4, 1.0), flip=True)
    store = cached("image", tar, tmp_path / "s.zarr", clip, shard_rows=SHARD_ROWS, views=views, pixels=24)
    tar.unlink()
    opened(browser, tmp_path, store)

    assert f"of {3 * GOOD} embeddings of {GOOD} rows" in browser.texts(".note")
    assert set(browser.widths("td img")) == {36}  # of short side 24
    assert browser.texts(".warning") == []


def test_sentences_stand_in_the_map_and_beside_each_other(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    lines = [
        f"a {one} {where}" for one in ("cat", "red bus", "tall tree") for where in ("asleep", "by the sea", "at night")
    ]
    file = write_text(tmp_path / "texts.txt", [HOSTILE, *lines, "two dogs on a beach", "Two dogs on a beach"])
    store = cached("text", file, tmp_path / "texts.zarr", clip)
    opened(browser, tmp_path, store)

    pair = [" ".join(one.split()) for one in browser.texts("#s3 figure:last-of-type tbody tr:first-child td")]
    assert sorted(one.rpartition(" (row")[0] for one in pair[:2]) == ["Two dogs on a beach", "two dogs on a beach"]
    assert pair[2] == "1.0000"
    above = browser.texts("#s3 figure:first-of-type tbody tr:first-child td")
    assert above[0] == "above 0.99"
    assert int(above[1]) >= 2
    words = browser.run("return [...document.querySelectorAll('.dots li')].map(one => one.textContent)")
    browser.hover(browser.all(".map .point")[words.index(f"{HOSTILE} (row 0)")])
    assert browser.texts("#tip") == [f"{HOSTILE} (row 0)"]
    assert browser.texts(".map .legend li") == ["texts.txt"]


def test_nothing_is_drawn_of_a_store_that_has_just_begun(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    request = PlanRequest(kind="image", arguments=(str(tar_of_images(tmp_path)),), shard_rows=SHARD_ROWS, batch_size=8)
    opened(browser, tmp_path, open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity))

    assert "There are too few embeddings yet to draw any." in browser.texts(".warning")
    assert list(shapes(browser)) == ["Rows by status"]


def test_two_stores_of_one_name_are_told_apart(browser: Browser, image_store: Store, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images.zarr").symlink_to(image_store.path)
    paths = [Store(str(tmp_path / name / "images.zarr")) for name in ("one", "other")]
    opened(browser, tmp_path, *paths)

    assert browser.texts("h2")[::3] == ["one/images.zarr: images", "other/images.zarr: images"]


def test_a_page_of_the_shipped_size_stays_small(browser: Browser, clip: Clip, sample: Path, tmp_path: Path) -> None:
    """The sample's images, with embeddings from nowhere."""
    request = PlanRequest(kind="image", arguments=(str(sample / "images"),), shard_rows=512, batch_size=64)
    store = open_or_plan(request, str(tmp_path / "images.zarr"), clip.identity)
    rng = np.random.default_rng(0)
    for shard in range(store.schema.shards):
        start, stop = store.schema.shard_range(shard)
        embedding_ND = rng.standard_normal((stop - start, store.schema.dim)).astype(np.float32)
        arrays: dict[str, Any] = {"embedding": embedding_ND.astype(np.float16)}
        arrays["status"] = np.full(stop - start, Status.OK, np.uint8)
        store.write_shard(shard, arrays, [], device="cpu", seconds=1.0)
    page = opened(browser, tmp_path, store)

    assert store.schema.rows > 5000
    assert browser.run("return document.querySelectorAll('.dots [data-image]').length") == 600
    assert 500_000 < page.stat().st_size < 5_000_000


def test_the_nearest_row_is_that_of_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    embedding_ND = rng.standard_normal((40, 8)).astype(np.float32)
    embedding_ND /= np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    cosine_NN = embedding_ND @ embedding_ND.T
    np.fill_diagonal(cosine_NN, -1)
    found = nearest(embedding_ND)
    np.testing.assert_array_equal(found.place_N, cosine_NN.argmax(axis=1))
    np.testing.assert_allclose(found.cosine_N, cosine_NN.max(axis=1), atol=1e-6)
    pairs = found.pairs(5)
    assert pairs[0] == (*sorted(np.unravel_index(cosine_NN.argmax(), cosine_NN.shape)), pytest.approx(cosine_NN.max()))
    assert len({(one, other) for one, other, _ in pairs}) == len(pairs) == 5
    assert all(one < other for one, other, _ in pairs)
    assert random_cosines(np.eye(3, dtype=np.float32), 100).max() == 0  # never a row with itself


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/b/c.zarr", "/a/d/c.zarr", "/a/e.zarr/"]) == ["b/c.zarr", "d/c.zarr", "e.zarr"]
    assert short_names(["c.zarr"]) == ["c.zarr"]
    assert short("one\n two " * 50, 12) == "one two one…"


def test_a_file_that_was_replaced_gives_no_wrong_picture(browser: Browser, clip: Clip, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{n}.jpg": make_jpeg(seed=n) for n in range(12)})
    store = cached("image", tar, tmp_path / "images.zarr", clip)
    write_tar(tar, {f"{n}.jpg": make_jpeg(seed=n + 50) for n in range(30)})
    opened(browser, tmp_path, store)

    assert "its file is another one than when it was cached" in browser.texts(".warning")[0]
    assert browser.run("return document.images.length") == 0


@pytest.mark.parametrize("rows", [1, 17, 129, 300, 5001])
def test_a_sample_has_as_many_rows_as_there_are(tmp_path: Path, rows: int) -> None:
    store, _ = random_store(tmp_path / "i.zarr", rows=rows, shard_rows=128, failed=(0,) if rows > 1 else ())
    found = sample_rows(store, 200)
    assert len(found.rows_N) >= min(200, rows - (rows > 1)) * 0.5
    assert len(np.unique(found.rows_N)) == len(found.rows_N)
    whole = min(-(-rows // 128), 16) * 128  # of at most 16 shards
    assert len(sample_rows(store, 10**6).rows_N) >= min(rows, whole) - 128
