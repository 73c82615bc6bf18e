"""What a document names is opened only where that cannot run, fetch from a chosen host, or hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from cache_schemas import SchemaError
from cache_schemas.document import CHECKSUM, digest_of
from cache_schemas.embedding_store import ATTRIBUTES_KEY, rows_path
from cache_schemas.index import SIDECAR_FILE
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.worker import Job, Worker
from dimefm.errors import SourceError, StoreError, TrainingError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.inspection.info import describe
from dimefm.models.clip import Clip
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.index_search import IndexSearch
from dimefm.retrieval.retrieve import retrieve
from dimefm.retrieval.search import search
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.sources.files import expand
from dimefm.sources.read_image import ImagePlace, read_encoded, read_image
from dimefm.store.embedding_store import Store
from dimefm.system.named_paths import VARIABLE, allow, allowed, allowing, named
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.train import train
from tests.making import make_jpeg, upload, write_tar
from tests.stores import random_store
from tests.tiny_training import tiny_config

CHAINS = ["dir::spy://x", "simplecache::spy://x/t.zarr", "reference://::spy://x/t.zarr", "s3://bucket/a::spy://x"]


class Spy(MemoryFileSystem):  # type: ignore[misc]
    """A file system that keeps count of who wants one."""

    protocol = "spy"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    opened = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        Spy.opened += 1
        super().__init__(*args, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("spy://")))


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Spy]]:
    fsspec.register_implementation("spy", Spy, clobber=True)
    monkeypatch.delenv(VARIABLE, raising=False)
    Spy.opened = 0
    yield Spy
    Spy.store.clear()


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    images, _ = random_store(tmp_path / "i.zarr", rows=40, shard_rows=32)
    texts, _ = random_store(tmp_path / "t.zarr", rows=100, shard_rows=64, kind="text", seed=1)
    retrieve(images.path, texts.path, index=None, top_k=4, out=str(tmp_path / "p.zarr"), device="cpu")
    return str(tmp_path / "p.zarr")


def changed(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The document saying this instead, with the checksum that whoever wrote it so would have given it."""
    rest = {name: value for name, value in document.items() if name != CHECKSUM} | fields
    return {**rest, CHECKSUM: digest_of(rest)}


def renamed(folder: str, **fields: str) -> str:
    """The store whose document now says this; as downloaded from somebody who wrote so."""
    fs, inner = fsspec.url_to_fs(f"{folder}/zarr.json")
    group = json.loads(fs.cat_file(inner))
    group["attributes"][ATTRIBUTES_KEY] = changed(group["attributes"][ATTRIBUTES_KEY], **fields)
    fs.pipe_file(inner, json.dumps(group).encode())
    return folder


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", ["spy://x/t.zarr", *CHAINS])
def test_info_opens_nothing_that_a_document_leads_to(pairs: str, spy: type[Spy], texts: str) -> None:
    text = describe(renamed(pairs, texts=texts))
    assert f"texts store   {texts}" in text
    assert "info does not open that texts store" in text
    assert spy.opened == 0


def test_info_shows_the_sentences_of_a_local_store_and_of_one_in_the_same_bucket(pairs: str, tmp_path: Path) -> None:
    assert " hits " in describe(pairs)
    url = upload(tmp_path, "memory://bucket/all")
    assert " hits " in describe(renamed(f"{url}/p.zarr", texts=f"{url}/t.zarr"))
    assert " hits " not in describe(renamed(f"{url}/p.zarr", texts="memory://other/all/t.zarr"))


@pytest.mark.parametrize("texts", ["spy://x/t.zarr", *CHAINS[:3]])
def test_a_selection_does_not_follow_the_pairs(pairs: str, tmp_path: Path, spy: type[Spy], texts: str) -> None:
    with pytest.raises(StoreError, match=r"p\.zarr names .*spy://x"):
        select_texts(SelectionConfig(pairs=renamed(pairs, texts=texts), out=str(tmp_path / "s")))
    assert spy.opened == 0


def test_a_store_that_the_user_names_is_opened_in_its_place(pairs: str, tmp_path: Path) -> None:
    path = renamed(pairs, texts="spy://x/t.zarr")
    config = SelectionConfig(pairs=path, texts=str(tmp_path / "t.zarr"), out=str(tmp_path / "s"))
    assert select_texts(config).kept


@pytest.mark.parametrize("call", [IndexSearch.open, lambda path: search(path, texts=["a cat"], device="cpu")])
def test_an_index_does_not_lead_to_its_store(tmp_path: Path, spy: type[Spy], call: Callable[[str], object]) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=100, shard_rows=64, kind="text", seed=1)
    out = tmp_path / "t.index"
    build_index(IndexConfig(store=texts.path, out=str(out)))
    document = json.loads((out / SIDECAR_FILE).read_text())
    (out / SIDECAR_FILE).write_text(json.dumps(changed(document, store="spy://x/t.zarr")))
    with pytest.raises(StoreError, match=r"index\.json names spy://x/t\.zarr: .*\n  remedy: if you trust it, set DIME"):
        call(str(out))
    assert spy.opened == 0
    (out / SIDECAR_FILE).write_text(json.dumps(changed(document, file=os.path.relpath("/etc/hostname", out))))
    with pytest.raises(SchemaError, match="file: must lie beside the sidecar"):
        call(str(out))


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["http://127.0.0.1:9/a.jpg", "spy://x/a.jpg", *CHAINS, "spy://x/a.parquet#image"])
def test_a_plan_does_not_choose_the_host(spy: type[Spy], file: str) -> None:
    with pytest.raises(StoreError, match="the plan names"):
        read_image(ImagePlace(file, 0, 10))
    assert spy.opened == 0


@pytest.mark.timeout(20)
def test_a_plan_does_not_lead_into_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(StoreError, match="it is neither a file nor a folder"):
            read_image(ImagePlace(file, 0, 10))


def test_a_local_name_with_colons_is_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "dir::a.jpg").write_bytes(b"12345")
    assert read_encoded(ImagePlace(str(tmp_path / "dir::a.jpg"), 1, 3)) == b"234"


def test_stores_and_globs_may_have_local_names_with_colons(tmp_path: Path) -> None:
    random_store(tmp_path / "i::i.zarr", rows=8, shard_rows=8)
    random_store(tmp_path / "t::t.zarr", rows=8, shard_rows=8, kind="text", seed=1)
    images, texts, out = (str(tmp_path / f"{name}.zarr") for name in ("i::i", "t::t", "p::p"))
    retrieve(images, texts, index=None, top_k=2, out=out, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i::i.zarr", "p::p.zarr", "t::t.zarr"]
    assert [place.path for place in expand(f"{tmp_path}/t::*")] == [texts]


def test_training_does_not_follow_a_plan(tmp_path: Path, spy: type[Spy]) -> None:
    store, _ = random_store(tmp_path / "i.zarr", rows=32, shard_rows=32)
    images = TrainingImages(store.path, Augmentation(size=32, crop_scale=(0.5, 1.0), flip=True, seed=0))
    rows_B = np.array([3])
    request = Request(0, 0, rows_B, rows_B, [ImagePlace("spy://x/a.jpg", 0, 10)])
    found = images[request]
    assert isinstance(found, TrainingError)
    assert "the plan names spy://x/a.jpg" in str(found)
    assert spy.opened == 0


def test_what_the_user_types_may_be_planned_and_read_again(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other machines too, whose workers have not seen the command line; later commands ask for a word."""
    fsspec.filesystem("spy").pipe_file("/in/a.jpg", make_jpeg())
    request = PlanRequest(kind="image", arguments=("spy://in",), shard_rows=8, batch_size=2)
    with allowing(request.arguments):
        schemes = allowed()
        store = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity)
    assert schemes == "spy"
    assert VARIABLE not in os.environ
    assert pq.read_table(f"{store.path}/{rows_path(0)}")["file"].to_pylist() == ["spy:///in/a.jpg"]
    with pytest.raises(StoreError, match=rf"set {VARIABLE}=spy"):
        encode_shard(store, 0, clip)
    monkeypatch.setenv(VARIABLE, "other")
    job = Job(store=store.path, teacher=clip.identity.name, pretrained=None, precision="fp32", device="cpu", threads=1,
              schemes=schemes)  # fmt: skip
    worker = Worker(job, clip)
    worker.start(1, 0)
    assert worker.encode(0).counts == {"OK": 1}
    assert torch.get_num_threads() == 1
    assert Store(store.path).committed() == {0}


def test_a_set_that_the_user_types_is_evaluated(
    tmp_path: Path, teacher_name: str, image_store: Store, text_store: Store, prompt_store: Store, cifar10: str
) -> None:
    members = {f"{key}.{end}": value for key in "ab" for end, value in (("jpg", make_jpeg()), ("cls", b"1"))}
    write_tar(tmp_path / "sets/cifar10/test-0.tar", members)
    for name in ("classnames.txt", "templates.txt"):
        shutil.copy(f"{cifar10}/{name}", tmp_path / "sets/cifar10")
    url = upload(tmp_path / "sets", "spy://sets")
    config = EvaluationConfig(model=teacher_name, device="cpu", out=str(tmp_path / "out"), threads=1)
    for words in ({"folders": (f"{url}/cifar10",)}, {"data": url, "sets": ("cifar10",)}):
        done = evaluate(replace(config, name="-".join(words), **words))
        assert not done.failed
        assert done.results[0].images == 2
    words = {"val": (f"{url}/cifar10",), "val_texts": prompt_store.path, "max_steps": 1}
    train(tiny_config(image_store, text_store, tmp_path / "run", **words))
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("source", CHAINS)
def test_a_chained_source_is_refused_before_it_is_planned(source: str, spy: type[Spy]) -> None:
    with (
        pytest.raises(SourceError, match="is chained, and a plan that names it would not be opened"),
        allowing([source]),
    ):
        pass
    assert spy.opened == 0


def test_object_stores_and_ordinary_files_need_no_word(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (str(tmp_path), str(tmp_path / "a"), str(tmp_path / "missing"), "s3://bucket/a.tar", "gs://b/c"):
        assert named(path, "it") == path
    for path in ("file:///etc/passwd", "local:///etc/passwd", "S3://b/c", "data://x"):
        with pytest.raises(StoreError):
            named(path, "it")


def test_allowing_more_keeps_what_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "https")
    with allowing(["sftp://host/a.tar", "s3://b/c", "/local"]):
        assert allowed() == "https,sftp"
        allow("")
        assert allowed() == "https,sftp"
    assert allowed() == "https"
