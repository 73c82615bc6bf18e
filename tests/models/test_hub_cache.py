"""A teacher of the Hub is asked for once; workers take it from the cache, and offline that is enough. A server on this
machine stands in for the Hub."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session

from dimefm.caching.worker import Job, Worker
from dimefm.errors import TeacherError, UnreadableError
from dimefm.models.clip import load_clip
from dimefm.models.hub import _one_of_this_machine, cached_first
from pipeline.cache import CacheConfig, cache
from tests.processes import result_of
from tests.tiny_clip import CONFIG, write_clip

MODEL, COMMIT = "somebody/model", "c" * 40
NAME = f"hf-hub:{MODEL}"
FILES = ("open_clip_config.json", "open_clip_model.safetensors")


class Hub:
    """What it was asked, how often it is to answer that it was asked too often, and how long each answer takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.refusals, self.seconds = folder, list[str](), 0, 0.0
        self.endpoint = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        threading.Event().wait(self.seconds)  # time.sleep is made short below
        path = self.folder / request.path.rpartition("/")[2]
        self.asked.append(f"{request.command} {path.name}")
        status, data = (200, path.read_bytes()) if path.exists() else (404, b"")
        if self.refusals:
            self.refusals, status, data = self.refusals - 1, 429, b""
        request.send_response(status)
        request.send_header("ETag", f'"{path.name}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(data)))
        if status == 404:
            request.send_header("X-Error-Code", "EntryNotFound")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With one small CLIP, and nothing of it in the cache."""
    found = Hub(Path(write_clip(tmp_path / "at-the-hub")))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found.answer(self)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    ask_at(found.endpoint, monkeypatch)
    with_cache(tmp_path / "cache", monkeypatch)
    close_session()
    yield found
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def ask_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True),
    ):
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(f"huggingface_hub.file_download.{name}", value, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def with_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


@pytest.fixture
def job(hub: Hub, tmp_path: Path) -> Job:
    """Of a store of two sentences, whose teacher the command has fetched."""
    (tmp_path / "s.txt").write_text("a cat\na dog\n")
    words: dict[str, Any] = {"kind": "text", "sources": (str(tmp_path / "s.txt"),), "out": str(tmp_path / "t.zarr")}
    store = cache(CacheConfig(**words, teacher=NAME, device="cpu", workers=1))
    assert {"GET open_clip_config.json", "GET open_clip_model.safetensors"} <= set(hub.asked)
    hub.asked.clear()
    return Job(store=store.path, teacher=NAME, pretrained=None, precision="fp32", device="cpu", threads=1)


def test_workers_do_not_ask_the_hub_again(job: Job, hub: Hub) -> None:
    for _ in range(2):
        Worker(job).start(1, 0, check=True)
    assert hub.asked == []
    assert not constants.HF_HUB_OFFLINE  # a worker on a machine without the cache may


def fetched(hub: str, cache: str) -> list[bytes]:
    """The files of a model, as the workers of a machine without it fetch them."""
    with pytest.MonkeyPatch.context() as patch:
        ask_at(hub, patch)
        with_cache(Path(cache), patch)
        close_session()
        return cached_first(lambda: [Path(hf_hub_download(MODEL, file)).read_bytes() for file in FILES])


def test_of_four_processes_at_once_one_asks_for_each_file(hub: Hub, tmp_path: Path) -> None:
    hub.seconds = 0.2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: result_of(fetched, hub.endpoint, str(tmp_path / "node")), range(4)))
    assert found == [[(hub.folder / file).read_bytes() for file in FILES]] * 4
    assert sorted(hub.asked) == [f"{method} {file}" for method in ("GET", "HEAD") for file in FILES]


def test_what_the_first_could_not_fetch_is_asked_for_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cache(tmp_path / "cache", monkeypatch)
    offline = list[bool]()

    def load() -> None:
        offline.append(constants.HF_HUB_OFFLINE)
        raise TeacherError("the Hub does not answer")

    with ThreadPoolExecutor(1) as pool:
        with _one_of_this_machine():
            waits = pool.submit(cached_first, load)
            while not offline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert offline == [True]
        with pytest.raises(TeacherError, match="the Hub does not answer"):
            waits.result()
    assert offline == [True, True, False]


def test_a_cache_that_cannot_be_locked_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with_cache(tmp_path / "file" / "cache", monkeypatch)
    with _one_of_this_machine():
        assert cached_first(lambda: "loaded") == "loaded"


def test_a_worker_without_the_cache_asks_and_waits(
    job: Job, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cache(tmp_path / "elsewhere", monkeypatch)
    hub.refusals = 3
    Worker(job).start(1, 0)
    assert "GET open_clip_model.safetensors" in hub.asked


def test_a_worker_whom_the_hub_refuses_is_put_aside(
    job: Job, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cache(tmp_path / "elsewhere", monkeypatch)
    hub.refusals = 10**6
    with pytest.raises(UnreadableError, match=f"cannot load {NAME}"):  # what the supervisor puts a worker aside for
        Worker(job).start(1, 0)


def test_a_command_goes_on_with_the_cache_where_the_hub_refuses(job: Job, hub: Hub) -> None:
    hub.refusals = 10**6
    assert load_clip(NAME, device="cpu").identity.preprocessing_from == "its config"


def test_offline_a_filled_cache_is_enough(job: Job, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository and of a tag, which open_clip takes from the Hub too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tag = {"hf_hub": f"{MODEL}/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CONFIG)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"tag": tag})
    assert load_clip(NAME, device="cpu").identity.weights == load_clip("tiny", "tag", device="cpu").identity.weights
    assert hub.asked == []
    with pytest.raises(TeacherError, match="cannot load hf-hub:somebody/other"):
        load_clip("hf-hub:somebody/other", device="cpu")


def test_why_weights_do_not_come_is_said(hub: Hub) -> None:
    next(hub.folder.glob("*.safetensors")).unlink()
    with pytest.raises(TeacherError, match=r"cannot load hf-hub:somebody/model: (?s:.*)404"):
        load_clip(NAME, device="cpu")
