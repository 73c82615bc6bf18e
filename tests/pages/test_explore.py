"""`dimefm explore` in a real browser: what is asked is answered as `dimefm search` does, and shown with pictures."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.by import By

from dimefm.commands.retrieval import student_of
from dimefm.errors import MismatchError, StoreError
from dimefm.models.clip import Clip
from dimefm.models.onnx_towers import OnnxTowers
from dimefm.pages.explore import ExploreConfig, Explorer
from dimefm.pages.server import PageServer
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.search import search
from dimefm.retrieval.searched import Hit, Student
from dimefm.store.embedding_store import Store
from tests.conftest import cached
from tests.making import read_tar
from tests.pages.browser import Browser
from tests.pages.serving import Serving
from tests.stores import random_store
from tests.tiny_onnx import write_onnx

HOSTILE = "<script>document.title='run'</script><img src=x onerror=alert(2)>\u202e{{ 7*7 }}"
INERT = "<script>document.title='run'</script><img src=x onerror=alert(2)>\\u202e{{ 7*7 }}"

Served = Callable[..., PageServer]


@pytest.fixture
def served() -> Iterator[Served]:
    """Serves explorers of paths until the test ends."""
    with ExitStack() as stack:

        def serve(path: str, student: Student | None = None, **options: Any) -> PageServer:
            explorer = Explorer(ExploreConfig(path, device="cpu", **options), student)
            stack.enter_context(explorer.loading())
            server = stack.enter_context(PageServer(explorer.routes, 0))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield serve


def ask(server: PageServer, path: str, body: bytes | None = None, host: str = "") -> Any:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Host": host} if host else {}
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    assert response.status == (403 if host else 200), data
    return json.loads(data) if response.headers["Content-Type"] == "application/json" else data


def pairs(hits: list[Hit]) -> list[tuple[int, float]]:
    return [(hit.row, hit.score) for hit in hits]


def answered(found: Any) -> list[tuple[int, float]]:
    return [(hit["row"], hit["score"]) for hit in found["hits"]]


def shown_rows(browser: Browser) -> list[int]:
    links = browser.run("return [...document.querySelectorAll('#found a')].map(one => one.hash)")
    return [int(link.partition("row=")[2].partition("&")[0]) for link in links]


def texts(browser: Browser, selector: str) -> list[str]:
    """As Browser.texts, at one moment: answers replace what is shown."""
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
    found: list[str] = browser.run(script, selector)
    return found


def heading(browser: Browser, words: str) -> None:
    """Wait for an answer with this heading."""
    wait_for(lambda: words in "".join(texts(browser, "#asked h2")), f"{words!r}, but {texts(browser, '#asked h2')}")


def wait_for(found: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 15
    while not found():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.03)


def pictures(browser: Browser) -> int:
    """How many pictures of results are really shown."""
    script = "return [...document.querySelectorAll('#found img')].filter(one => one.naturalWidth > 0).length"
    return int(browser.run(script))


# -- in the browser ---------------------------------------------------------------------------------------------------


def test_a_sentence_an_image_and_a_click_each_show_what_is_nearest_and_back_returns(
    image_store: Store, image_tar: Path, served: Served, browser: Browser, tmp_path: Path
) -> None:
    expected = search(image_store.path, texts=["a dog on a log"], top_k=24, device="cpu")[0]
    browser.open(served(image_store.path).url)
    heading(browser, "Some images to begin with")
    browser.type("#sentence", "a dog on a log")
    browser.press(browser.one("#sentence"), "ENTER")
    heading(browser, "Nearest to \u201ca dog on a log\u201d")
    assert shown_rows(browser) == [hit.row for hit in expected]
    cosines = [f"{hit.score:.3f}".replace("-", "\u2212") for hit in expected]
    assert texts(browser, "#found b") == cosines
    wait_for(lambda: pictures(browser) == 24, "24 pictures")

    data = list(read_tar(image_tar, 96).values())[70]
    (tmp_path / "mine.jpg").write_bytes(data)
    (by_image,) = search(image_store.path, images=[str(tmp_path / "mine.jpg")], top_k=24, device="cpu")
    browser.driver.find_element(By.ID, "file").send_keys(str(tmp_path / "mine.jpg"))
    heading(browser, "Nearest to mine.jpg")
    assert shown_rows(browser) == [hit.row for hit in by_image]
    assert (shown_rows(browser)[0], texts(browser, "#found b")[0]) == (70, "1.000")
    wait_for(lambda: pictures(browser) == 24, "24 pictures")

    chosen = shown_rows(browser)[3]
    browser.all("#found a")[3].click()
    heading(browser, f"Nearest to row {chosen}: ")
    assert shown_rows(browser)[0] == chosen
    browser.driver.back()
    heading(browser, "Nearest to mine.jpg")
    browser.driver.back()
    heading(browser, "Nearest to \u201ca dog on a log\u201d")
    assert shown_rows(browser) == [hit.row for hit in expected]
    assert browser.one("#sentence").get_attribute("value") == "a dog on a log"
    browser.driver.forward()
    heading(browser, "Nearest to mine.jpg")
    browser.one("#count").send_keys("96")
    wait_for(lambda: len(shown_rows(browser)) == 96, "96 results")


def test_what_is_no_image_or_is_too_large_gives_words(
    image_store: Store, served: Served, browser: Browser, tmp_path: Path
) -> None:
    browser.open(served(image_store.path).url)
    heading(browser, "Some images to begin with")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    browser.driver.find_element(By.ID, "file").send_keys(str(tmp_path / "broken.jpg"))
    wait_for(lambda: texts(browser, "#found .warning"), "words")
    assert texts(browser, "#found .warning")[0].startswith("the image: ")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(50 * 2**20 + 1)
    browser.driver.find_element(By.ID, "file").send_keys(str(tmp_path / "huge.png"))
    wait_for(lambda: texts(browser, "#found .warning") == ["huge.png has more than 50 MB"], "words")
    browser.run("location.hash = 'image=9'")
    wait_for(lambda: "closed" in "".join(texts(browser, "#found .warning")), "words")


def test_a_dropped_and_a_pasted_image_ask(
    image_store: Store, image_tar: Path, served: Served, browser: Browser
) -> None:
    data = list(read_tar(image_tar, 96).values())
    browser.open(served(image_store.path).url)
    heading(browser, "Some images to begin with")
    give = """const [bytes, name, kind] = arguments, all = new DataTransfer();
        all.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
        document.body.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: all })
            : new ClipboardEvent("paste", { bubbles: true, clipboardData: all }));"""
    for row, kind in ((12, "drop"), (33, "paste")):
        browser.run(give, list(data[row]), f"{kind}.jpg", kind)
        heading(browser, f"Nearest to {kind}.jpg")
        assert shown_rows(browser)[0] == row


def test_hostile_sentences_are_text(clip: Clip, served: Served, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(f"{HOSTILE}\na dog\na cat\n", encoding="utf-8")
    store = cached("text", tmp_path / "t.txt", tmp_path / "t.zarr", clip)
    browser.open(served(store.path).url)
    heading(browser, "Some sentences to begin with")
    assert texts(browser, "#found .words") == [INERT, "a dog", "a cat"]
    browser.all("#found a")[0].click()
    heading(browser, f"Nearest to row 0: {INERT}")
    assert texts(browser, "#found b")[0] == "1.000"
    browser.type("#sentence", "<img src=x onerror=alert(1)>")
    browser.press(browser.one("#sentence"), "ENTER")
    heading(browser, "Nearest to \u201c<img src=x onerror=alert(1)>\u201d")
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.querySelectorAll('[onerror], #found img').length") == 0
    assert browser.driver.title.startswith("dimefm: ")


def test_without_the_teacher_rows_still_ask(served: Served, browser: Browser, tmp_path: Path) -> None:
    """Its images are gone too: there are words in their places."""
    store, values_ND = random_store(tmp_path / "i.zarr", rows=40, shard_rows=16, failed=(3,))
    browser.open(served(store.path).url)
    wait_for(lambda: "cannot load local-dir:/somewhere" in "".join(texts(browser, "#status.warning")), "words")
    heading(browser, "Some images to begin with")
    browser.run("location.hash = 'row=7&count=12'")
    heading(browser, "Nearest to row 7: k7")
    cosine_N = values_ND.astype(np.float32) @ values_ND[7].astype(np.float32)
    cosine_N[3] = -2
    assert shown_rows(browser) == np.argsort(-cosine_N)[:12].tolist()
    wait_for(lambda: "it has no bytes" in texts(browser, "#found .none"), "why there is no picture")
    browser.run("location.hash = 'text=a+dog'")
    wait_for(lambda: "give --teacher" in "".join(texts(browser, "#found .warning")), "words")
    browser.run("location.hash = 'row=3'")
    wait_for(lambda: texts(browser, "#found .warning") == ["row 3 has no embedding"], "words")


def test_a_teacher_without_a_text_tower_takes_no_sentence(served: Served, browser: Browser, tmp_path: Path) -> None:
    facts = {"tokenizer": "", "context_length": 0, "logit_scale": 0.0}
    store, _ = random_store(tmp_path / "i.zarr", rows=20, shard_rows=16, **facts)
    server = served(store.path)
    browser.open(server.url)
    heading(browser, "Some images to begin with")
    assert not browser.one("#sentence").is_enabled()
    assert "has no text tower: it cannot be asked with a sentence" in ask(server, "/text", b"a dog")["error"]


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_is_not_wider_than_its_window(text_store: Store, served: Served, browser: Browser, width: int) -> None:
    browser.resize(width)
    browser.open(f"{served(text_store.path).url}#row=5&count=24")
    heading(browser, "Nearest to row 5")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.resize(1200)


# -- what the server answers ------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_search(
    image_store: Store, text_store: Store, image_tar: Path, served: Served, tmp_path: Path
) -> None:
    """Of a store whose rows are kept, of one whose rows are read each time, and of an index."""
    image = next(iter(read_tar(image_tar, 1).values()))
    (tmp_path / "a.jpg").write_bytes(image)
    build_index(IndexConfig(store=text_store.path, out=str(tmp_path / "t.index")))
    for path, options in (
        (image_store.path, {}),
        (text_store.path, {"memory": 1000}),
        (str(tmp_path / "t.index"), {}),
    ):
        server = served(path, **options)
        by_image, by_text = search(path, images=[str(tmp_path / "a.jpg")], texts=["a cat"], top_k=7, device="cpu")
        assert answered(ask(server, "/image?count=7", image)) == pairs(by_image)
        found = ask(server, "/text?count=7", b" a cat\n")
        assert answered(found) == pairs(by_text)
        assert [hit["words"] for hit in found["hits"]] == [hit.entry.get("text", hit.entry["key"]) for hit in by_text]
        state = ask(server, "/state")
        slow = "every answer reads all rows" in state["words"] and "dimefm build-index" in state["words"]
        assert (state["state"], slow) == ("ready", bool(options))


def test_a_store_without_an_embedding_gives_words(served: Served, tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "i.zarr", rows=3, shard_rows=16, failed=(0, 1, 2))
    server = served(store.path)
    assert "none of its 3 images has an embedding" in ask(server, "/start")["error"]
    assert ask(server, "/row?row=1")["error"] == "row 1 has no embedding"


def test_what_cannot_be_asked_is_answered_in_words(image_store: Store, text_store: Store, served: Served) -> None:
    server = served(image_store.path)
    for path, body, what in (
        ("/row?row=96", None, "there is no row 96"),
        ("/row?row=-1", None, "there is no row -1"),
        (f"/row?row={'9' * 5000}", None, "there is no row 999"),
        ("/row", None, "there is no row"),
        ("/row?row=1&count=0", None, "0 results cannot be shown"),
        ("/row?row=1&count=1001", None, "ask for 1 to 1,000"),
        ("/text", b"  \n", "there is no sentence"),
        ("/image", b"", "the image: no bytes"),
    ):
        assert what in ask(server, path, body)["error"], path
    assert len(ask(server, "/row?row=1&count=1000")["hits"]) == 96
    assert ask(server, "/picture?row=1")[:3] == b"\xff\xd8\xff"
    for host in (f"evil.example:{server.port}", f"127.0.0.1.evil.example:{server.port}"):
        assert b"only " in ask(server, "/row?row=1", host=host)


def test_a_student_asks_in_place_of_the_teacher(tmp_path: Path, served: Served) -> None:
    store, values_ND = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text", weights="w" * 64)
    model = write_onnx(tmp_path / "student", teacher="w" * 64)
    server = served(store.path, student=student_of(str(model), "cpu"))
    (query_D,) = OnnxTowers(model).encode_texts(["a dog"])
    found = answered(ask(server, "/text?count=20", b"a dog"))
    np.testing.assert_allclose(
        [score for _, score in found], np.sort(values_ND.astype(np.float32) @ query_D)[::-1], atol=2e-3
    )
    assert f"the student {model} of local-dir:/somewhere" in ask(server, "/").decode()


def test_mistakes_are_errors_before_a_page_is_served(text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is neither a dimefm store nor an index"):
        Explorer(ExploreConfig(str(tmp_path)))
    with pytest.raises(MismatchError, match="was not distilled from"):
        Explorer(ExploreConfig(text_store.path), Student("other", "v" * 64, lambda: pytest.fail("loaded")))


def test_the_command_answers_and_ends_while_it_still_loads(text_store: Store) -> None:
    with Serving("explore", text_store.path, "--device", "cpu") as serving:
        connection = HTTPConnection("127.0.0.1", serving.port, timeout=30)
        connection.request("GET", "/state")
        assert json.loads(connection.getresponse().read())["state"] == "loading"
        code, error = serving.stop(signal.SIGINT)
    assert (code, error.splitlines()[1:]) == (130, ["Stopped by Ctrl-C: the page is served no more"])
