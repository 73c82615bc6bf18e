"""Every source on S3: the same samples and bytes as on a local disk, and how much is asked of the server for them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest

from cache_schemas.plan import SourceFile
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.errors import DimefmError, SourceError
from dimefm.images.decode import DecodeError
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.sources import files
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample
from dimefm.sources.files import expand
from dimefm.sources.image_sources import WebDataset, open_image_source
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.sources.text_sources import open_text_source
from dimefm.store.captions import open_captions
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.read_ahead import in_order
from pipeline.cache import CacheConfig, cache
from tests.contracts.source_contract import accounted, listed
from tests.making import make_jpeg, upload, write_lineidx, write_parquet, write_tar, write_text, write_tsv

if TYPE_CHECKING:
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]

IMAGES = {name: make_jpeg(seed=seed) for seed, name in enumerate(("000", "010", "кот", "dog"))}
SENTENCES = ["A red bus.", "Ein Bär schläft.", "猫が寝ている。", "🦓"]
SUFFIX = {"tar": ".tar", "parquet": ".parquet", "tsv": ".tsv", "lineidx": ".tsv", "folder": ".jpg"}


def write_images(kind: str, folder: Path) -> None:
    """The images in two files of a kind, or in two folders."""
    items = list(IMAGES.items())
    for number, part in enumerate((dict(items[:2]), dict(items[2:]))):
        if kind == "tar":
            write_tar(folder / f"{number}.tar", {f"{key}.jpg": data for key, data in part.items()})
        elif kind == "parquet":
            write_parquet(folder / f"{number}.parquet", [{"key": k, "image": {"bytes": v}} for k, v in part.items()])
        elif kind == "folder":
            (folder / str(number)).mkdir()
            for key, data in part.items():
                (folder / str(number) / f"{key}.jpg").write_bytes(data)
        else:
            path = write_tsv(folder / f"{number}.tsv", part)
            if kind == "lineidx":
                write_lineidx(path)


def write_sentences(kind: str, folder: Path) -> None:
    """The sentences in two files of a kind."""
    for number, part in enumerate((SENTENCES[:3], SENTENCES[3:])):
        lines = {
            "txt": part,
            "jsonl": [f'{{"text": "{text}"}}' for text in part],
            "csv": ["id,text", *(f'1,"{text}"' for text in part)],
            "tsv": ["text\tid", *(f"{text}\t1" for text in part)],
        }
        if kind == "parquet":
            write_parquet(folder / f"{number}.parquet", [{"text": text} for text in part])
        else:
            write_text(folder / f"{number}.{kind}", lines[kind.removesuffix(".gz")])


def read_all(samples: list[ImageSample]) -> dict[str, bytes]:
    return {sample.key: read_encoded(sample) for sample in samples}


# -- the same as on a disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SUFFIX)
def test_images_are_those_of_the_disk(tmp_path: Path, s3: str, kind: str) -> None:
    write_images(kind, tmp_path)
    upload(tmp_path, f"{s3}/images")
    local, there = open_image_source([str(tmp_path)]), open_image_source([f"{s3}/images"])
    samples, reports = listed(there)
    assert reports == []
    assert samples == [s._replace(file=s.file.replace(str(tmp_path), f"{s3}/images")) for s in listed(local)[0]]
    assert sorted(read_all(samples).values()) == sorted(IMAGES.values())
    assert {sample.file.partition("#")[0] for sample in samples} == {file.path for file in there.files()}
    assert [file.size for file in there.files()] == [file.size for file in local.files()]
    assert all(abs(file.modified / 1e9 - time.time()) < 600 for file in there.files())


@pytest.mark.parametrize("kind", ["tar", "parquet", "tsv", "lineidx"])
def test_globs_ranges_and_names_are_the_folder(tmp_path: Path, s3: str, kind: str) -> None:
    write_images(kind, tmp_path)
    url, suffix = upload(tmp_path, f"{s3}/a/b"), SUFFIX[kind]
    folder = open_image_source([url])
    for arguments in ([f"{url}/*{suffix}"], [f"{url}/{{0..1}}{suffix}"], [f"{url}/{i}{suffix}" for i in range(2)]):
        source = open_image_source(arguments)
        assert source.files() == folder.files()
        assert listed(source) == listed(folder)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz", "parquet"])
def test_sentences_are_those_of_the_disk(tmp_path: Path, s3: str, kind: str) -> None:
    write_sentences(kind, tmp_path)
    url = upload(tmp_path, f"{s3}/texts")
    local, there = open_text_source([str(tmp_path)]), open_text_source([f"{url}/*.{kind}"])
    assert listed(there) == listed(local)
    assert [sample.text for sample in listed(there)[0]] == SENTENCES
    assert [(file.path, file.size) for file in there.files()] == [
        (file.path.replace(str(tmp_path), url), file.size) for file in local.files()
    ]
    assert listed(open_text_source([url])) == listed(local)


def test_prompts_are_those_of_the_disk(tmp_path: Path, s3: str) -> None:
    write_text(tmp_path / "set" / "classnames.txt", ["cat", "кот"])
    write_text(tmp_path / "set" / "templates.txt", ["a photo of a {c}."])
    there = open_text_source([upload(tmp_path / "set", f"{s3}/set")])
    assert listed(there) == listed(open_text_source([str(tmp_path / "set")]))
    assert len(there.files()) == 2


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_captions_are_those_of_the_disk(kind: str, tmp_path: Path, s3: str) -> None:
    members = {"a.jpg": make_jpeg(seed=1), "a.txt": b"one\ntwo", "b.jpg": make_jpeg(seed=2), "b.txt": b"three"}
    if kind == "tar":
        write_tar(tmp_path / "in" / "a.tar", members)
    else:
        (tmp_path / "in").mkdir()
        for name, data in members.items():
            (tmp_path / "in" / name).write_bytes(data)
    far, found = upload(tmp_path / "in", f"{s3}/in"), []
    for place in (str(tmp_path / "in"), far):
        found.append([(one.key, one.captions) for one in listed(open_image_source([place], captions="txt"))[0]])
    assert found[0] == found[1] == [("a", ("one", "two")), ("b", ("three",))]


@pytest.mark.slow  # that sources and stores are the same at a URL has quicker tests
def test_a_store_of_captions_at_a_url(tmp_path: Path, s3: str, teacher_name: str) -> None:
    members = {"a.jpg": make_jpeg(seed=1), "a.txt": b"one\ntwo", "b.jpg": make_jpeg(seed=2), "b.txt": b"TWO"}
    write_tar(tmp_path / "a.tar", members)
    config = CacheConfig(
        kind="image", sources=(upload(tmp_path, s3) + "/a.tar",), out=f"{s3}/I.zarr", teacher=teacher_name,
        captions="txt", workers=1, device="cpu",
    )  # fmt: skip
    images = cache(config)
    captions = open_captions(f"{s3}/I.captions.zarr", images)
    assert sorted(captions.pairs.gather(np.array([0]))[0].tolist()) == [0, 1]
    assert captions.pairs.gather(np.array([1]))[0].tolist() == [1, -1]
    assert cache(config).schema.identity == images.schema.identity
    assert verify(VerifyConfig(store=captions.texts.path)).trusted


# -- how much is asked ------------------------------------------------------------------------------------------------


def test_an_image_in_a_tar_is_read_by_its_range_alone(tmp_path: Path, s3: str, s3_requests: S3Requests) -> None:
    images = {f"{i}.jpg": os.urandom(50_000) for i in range(100)}
    write_tar(tmp_path / "a.tar", images)
    samples, _ = listed(open_image_source([upload(tmp_path, s3) + "/a.tar"]))
    s3_requests.clear()
    sample = samples[70]
    assert read_encoded(sample) == images["70.jpg"]
    assert len(s3_requests.seen) == 1
    _, _, asked, sent = s3_requests.of("GET", "a.tar")[0]
    assert asked == f"bytes={sample.offset}-{sample.offset + sample.size - 1}"
    assert sent == sample.size


def test_an_image_in_a_tsv_is_read_by_its_range_alone(tmp_path: Path, s3: str, s3_requests: S3Requests) -> None:
    images = {f"{i}": os.urandom(30_000) for i in range(50)}
    write_tsv(tmp_path / "a.tsv", images)
    samples, _ = listed(open_image_source([upload(tmp_path, s3) + "/a.tsv"]))
    s3_requests.clear()
    assert read_encoded(samples[30]) == images["30"]
    assert [request[3] for request in s3_requests.seen] == [40_000]


def test_a_row_of_a_parquet_file_is_read_without_its_other_columns(
    tmp_path: Path, s3: str, s3_requests: S3Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "URL_BLOCK", 1 << 16)
    rows = [{"other": os.urandom(400_000), "image": os.urandom(10_000), "key": str(i)} for i in range(40)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    samples, _ = listed(open_image_source([upload(tmp_path, s3) + "/a.parquet"], "image"))
    s3_requests.clear()
    assert [read_encoded(sample) for sample in samples] == [row["image"] for row in rows]
    assert 400_000 < sum(request[3] for request in s3_requests.seen) < 1_500_000


def test_large_members_of_a_tar_are_passed_over(tmp_path: Path, s3: str, s3_requests: S3Requests) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes(6_000_000) for i in range(4)})
    source = open_image_source([upload(tmp_path, s3) + "/a.tar"])
    s3_requests.clear()
    assert [sample.key for sample in listed(source)[0]] == ["0", "1", "2", "3"]
    assert sum(request[3] for request in s3_requests.seen) < 2_000_000


@pytest.mark.parametrize("argument", ["", "/*.tar"])
def test_files_of_a_folder_or_glob_are_not_asked_for_one_by_one(
    tmp_path: Path, s3: str, s3_requests: S3Requests, argument: str
) -> None:
    for i in range(30):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{i}.jpg": b"x"})
    upload(tmp_path, f"{s3}/tars")
    s3_requests.clear()
    source = open_image_source([f"{s3}/tars{argument}"])
    assert len(source.files()) == 30
    assert len(s3_requests.seen) < 8


# -- several tars at a time -------------------------------------------------------------------------------------------


def test_tars_are_listed_together_in_their_order_with_their_reports(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        path = write_tar(tmp_path / f"{i:02d}.tar", {f"{i}-{j}.jpg": make_jpeg(seed=j) for j in range(3)})
        if i % 7 == 3:
            path.write_bytes(path.read_bytes()[:2000])
    expected = listed(open_image_source([str(tmp_path)]))
    url = upload(tmp_path, f"{s3}/tars")
    reading, most, read = [0], [0], storage.read_bytes

    def slow(path: str, offset: int = 0, size: int | None = None) -> bytes:
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        time.sleep(0.3 if path.endswith("0.tar") else 0.1)
        reading[0] -= 1
        return read(path, offset, size)

    monkeypatch.setattr(storage, "read_bytes", slow)
    samples, reports = listed(open_image_source([url]))
    assert 16 < most[0] <= storage.CONNECTIONS
    assert [sample._replace(file=sample.file.replace(url, str(tmp_path))) for sample in samples] == expected[0]
    assert [report.replace(url, str(tmp_path)) for report in reports] == expected[1]
    assert len(reports) == 6


def test_members_with_more_dots_are_counted_over_all_tars(tmp_path: Path, s3: str) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", {f"{i}.left.jpg": b"x", f"{i}.jpg": b"y"})
    local, there = (
        accounted(open_image_source([str(tmp_path)])),
        accounted(open_image_source([upload(tmp_path, f"{s3}/tars")])),
    )
    assert [sample.key for sample in there[0]] == ["0", "1", "2"]
    assert there[1].lines() == [text.replace(str(tmp_path), f"{s3}/tars") for text in local[1].lines()]
    (skipped,) = there[1].skipped()
    assert (skipped.count, skipped.example) == (3, f"{s3}/tars/0.tar: 0.left.jpg")


def test_a_tree_is_accounted_for_as_on_a_disk(tmp_path: Path, s3: str) -> None:
    for name in (
        "a.jpg",
        ".DS_Store",
        ".thumbnails/a.jpg",
        "b/.cache/c.jpg",
        "b/c.JPG",
        "b/d.mp4",
        "b/noname",
        "b/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing" if name == "b/x" else make_jpeg())
    url = upload(tmp_path, f"{s3}/tree")
    local, there = (accounted_from_the_start(at) for at in (str(tmp_path), url))
    assert [sample.key for sample in there[0]] == [sample.key for sample in local[0]] == ["a", "b/c", "b/noname"]
    assert sorted(there[1].lines()) == sorted(text.replace(str(tmp_path), url) for text in local[1].lines())
    assert sum(one.count for one in there[1].skipped()) == 5
    assert [sample.key for sample in accounted_from_the_start(f"{url}/*")[0]] == ["a", "c", "noname"]


def accounted_from_the_start(argument: str) -> tuple[list[ImageSample], Account]:
    account = Account()
    return list(open_image_source([argument], account=account).samples(account)), account


def test_results_wait_for_the_one_who_takes_them() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        return number

    results = in_order(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert len(begun) == 3 + storage.CONNECTIONS
    next(results)
    results.close()
    ended = len(begun)
    time.sleep(0.3)
    assert len(begun) == ended


def test_a_tar_that_is_gone_ends_the_planning(tmp_path: Path, s3: str) -> None:
    url = upload(write_tar(tmp_path / "b.tar", {"0.jpg": b"0"}).parent, s3)
    with pytest.raises(SourceError, match=r"a\.tar cannot be read: The specified key does not exist"):
        listed(WebDataset([SourceFile(f"{url}/{name}", 1, 0) for name in ("b.tar", "a.tar")]))


# -- what is not there ------------------------------------------------------------------------------------------------


def test_what_does_not_exist_is_named(s3: str) -> None:
    for argument in (f"{s3}/no.tar", f"{s3}/no{{0..3}}.tar", f"{s3}-other/no.tar"):
        with pytest.raises(SourceError, match=r"no0?\.tar does not exist"):
            open_image_source([argument])
    with pytest.raises(SourceError, match="matches no file"):
        open_image_source([f"{s3}/*.tar"])


def test_a_file_that_is_gone_or_cut_short_is_read_as_far_as_it_goes(tmp_path: Path, s3: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"0123456789")
    (tmp_path / "none.jpg").write_bytes(b"")
    upload(tmp_path, s3)
    assert read_encoded(ImagePlace(f"{s3}/a.jpg", 4, 4)) == b"4567"
    assert read_encoded(ImagePlace(f"{s3}/a.jpg", 8, 5)) == b"89"
    assert read_encoded(ImagePlace(f"{s3}/a.jpg", 10, 5)) == b""
    assert read_encoded(ImagePlace(f"{s3}/a.jpg", 100, 5)) == b""
    assert storage.read_bytes(f"{s3}/none.jpg") == b""
    with pytest.raises(FileNotFoundError):
        read_encoded(ImagePlace(f"{s3}/b.jpg", 0, 4))
    with pytest.raises(FileNotFoundError):
        read_encoded(ImagePlace(f"{s3}/b.parquet#image", 0, 4))
    with pytest.raises(FileNotFoundError):
        read_encoded(ImagePlace(f"{s3}/b.tsv", 0, 4))
    table = write_text(tmp_path / "x" / "a.parquet", ["x"])
    no_table = ImagePlace(f"{upload(table.parent, s3)}/a.parquet#image", 0, 4)
    with pytest.raises(DecodeError):
        read_encoded(no_table)


def test_a_file_that_became_shorter_since_it_was_listed_is_read_as_far_as_it_goes(tmp_path: Path, s3: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"0123456789")
    (sample,), _ = listed(open_image_source([upload(tmp_path, f"{s3}/images")]))
    import boto3

    boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="images/a.jpg", Body=b"01")
    assert read_encoded(ImagePlace(sample.file, 0, sample.size)) == b"01"
    assert read_encoded(ImagePlace(sample.file, 5, 5)) == b""


def test_a_server_that_does_not_answer_is_an_oserror_and_a_source_error(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    try:
        with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
            read_encoded(ImagePlace(f"{s3}/a.jpg", 0, 4))
        with pytest.raises(SourceError, match=r"a\.tar cannot be read: .*\n  remedy: .*credentials"):
            open_image_source([f"{s3}/a.tar"])
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_listing_is_not_taken_from_memory(tmp_path: Path, s3: str) -> None:
    url = upload(write_tar(tmp_path / "a.tar", {"0.jpg": b"0"}).parent, s3)
    assert len(expand(f"{url}/*.tar")) == 1
    import boto3

    boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="b.tar", Body=(tmp_path / "a.tar").read_bytes())
    assert len(expand(f"{url}/*.tar")) == 2
    assert len(open_image_source([url]).files()) == 2


def test_a_forked_process_reads_s3(tmp_path: Path, s3: str) -> None:
    write_images("parquet", tmp_path)
    write_images("tar", tmp_path / "tars")
    tables = listed(open_image_source([upload(tmp_path, s3) + "/*.parquet"]))[0]
    tars: list[Any] = listed(open_image_source([f"{s3}/tars"]))[0]
    assert read_all(tables) == read_all(tars) == IMAGES
    child = os.fork()
    if child == 0:
        threading.Timer(30, lambda: os._exit(2)).start()  # instead of hanging for ever
        os._exit(0 if read_all(tables) == read_all(tars) == IMAGES else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- a token that runs out --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # by zarr, after a failed write
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_a_token_that_expires_at_any_request_costs_no_row(
    tmp_path: Path, s3: str, s3_requests: S3Requests, clip: Clip, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning, encoding and committing, all at URLs: s3fs takes it for a PermissionError."""
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0,))
    write_images(kind, tmp_path)
    request = PlanRequest(kind="image", arguments=(upload(tmp_path, f"{s3}/in"),), shard_rows=2, batch_size=2)

    def cached(out: str) -> Store:
        store = open_or_plan(request, out, clip.identity)
        for shard in sorted(set(range(store.schema.shards)) - store.committed()):
            encode_shard(store, shard, clip)
        return store

    s3_requests.clear()
    whole = cached(f"{s3}/undisturbed.zarr")
    requests = len(s3_requests.seen)
    assert whole.status().tolist() == [1] * len(IMAGES)
    for expires in (requests // 5, requests // 2, requests - 8):
        out = f"{s3}/{expires}.zarr"
        s3_requests.clear()
        s3_requests.expires = expires
        with pytest.raises((DimefmError, OSError), match=r"expired|Forbidden"):
            cached(out)
        s3_requests.clear()
        store = cached(out)
        assert store.status().tolist() == [1] * len(IMAGES)
        np.testing.assert_array_equal(store.read(0, len(IMAGES)), whole.read(0, len(IMAGES)))
        assert [store.plan(shard).equals(whole.plan(shard)) for shard in range(2)] == [True] * 2
