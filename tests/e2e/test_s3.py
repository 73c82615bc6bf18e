"""Stage 1 and training with everything on S3, and what is there is what a local disk would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from click.testing import CliRunner

from cache_schemas import SchemaError, ViewPlan
from cache_schemas.plan import planned_rows
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.image_loader import Loader
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.same_command import require_no_stranger
from dimefm.cli import cli
from dimefm.errors import DimefmError, StoreError
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.retrieval.retrieve import retrieve
from dimefm.sources.account import Account
from dimefm.sources.image_sources import open_image_source
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.zarr_arrays import array_of, open_group
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.progress import amount
from dimefm.training.batch_loader import Requests
from dimefm.training.config import TextMix
from dimefm.training.feed import notes_on_remote_data
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.row_order import Order
from dimefm.training.run_folder import Inputs
from dimefm.training.text_bank import TextBank
from dimefm.training.train import train
from tests.making import read_tar, upload, write_tar
from tests.processes import Command
from tests.stores import random_store
from tests.tiny_training import same, tiny_config, weights

if TYPE_CHECKING:
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]

VIEWS = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
KINDS = {"plain": {}, "full": {"pixels": 64, "views": VIEWS}}
ROWS, SHARD_ROWS = 40, 16


def put(path: Path, url: str) -> str:
    """Copy a file to S3; its URL."""
    fs, inner = fsspec.url_to_fs(f"{url}/{path.name}")
    fs.pipe_file(inner, path.read_bytes())
    return f"{url}/{path.name}"


def encode_rest(request: PlanRequest, out: str, clip: Clip) -> Store:
    """What the cache command does, without Ray."""
    with writing(out):
        store = open_or_plan(request, out, clip.identity)
        storage.remove_leftovers(store.path)
        for shard in sorted(set(range(store.schema.shards)) - store.committed()):
            encode_shard(store, shard, clip)
    return store


def request(source: str, kind: str = "plain") -> PlanRequest:
    return PlanRequest(kind="image", arguments=(source,), shard_rows=SHARD_ROWS, batch_size=8, **KINDS[kind])  # type: ignore[arg-type]


def contents(store: str) -> dict[str, bytes]:
    """Every file of the store that does not say when, or from where, it was made."""
    names = [name for name in storage.tree(store) if name.split("/")[0] not in ("commits", "rows", "zarr.json")]
    return {name: storage.read_bytes(storage.join(store, name)) for name in names}


@pytest.fixture(scope="module")
def tar(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = read_tar(sample / "images" / "train-00000.tar", ROWS)
    return write_tar(tmp_path_factory.mktemp("s3") / "images.tar", members)


@pytest.fixture(scope="module")
def local(tar: Path, clip: Clip) -> dict[str, Store]:
    """A store of each kind on a local disk."""
    return {kind: encode_rest(request(str(tar), kind), str(tar.with_name(f"{kind}.zarr")), clip) for kind in KINDS}


@pytest.fixture
def images(s3: str, tar: Path) -> str:
    """The tar on S3."""
    return put(tar, f"{s3}/in")


@pytest.fixture
def prepared(s3: str, local: dict[str, Store]) -> str:
    """The store with views and pixels, copied to S3."""
    return upload(Path(local["full"].path), f"{s3}/s.zarr")


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "full"])
def test_a_store_on_s3_holds_what_a_local_one_does(
    s3: str, images: str, clip: Clip, local: dict[str, Store], kind: str
) -> None:
    there = encode_rest(request(images, kind), f"{s3}/s.zarr", clip)
    assert contents(there.path) == contents(local[kind].path)
    assert verify(VerifyConfig(store=there.path, sample=4)).trusted


def test_rows_of_a_store_on_s3_are_read(prepared: str, local: dict[str, Store]) -> None:
    store, here, rows = Store(prepared), local["full"], np.array([39, 0, 15, 16, 20])
    np.testing.assert_array_equal(store.read(3, 37), here.read(3, 37))
    np.testing.assert_array_equal(store.gather(rows), here.gather(rows))
    np.testing.assert_array_equal(store.status(), here.status())
    for mine, theirs in zip(store.gather_view(rows, rows % 2), here.gather_view(rows, rows % 2), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert store.samples(rows) == here.samples(rows)
    assert list(store.pixels(rows)) == list(here.pixels(rows))


def test_what_another_process_writes_is_seen(prepared: str) -> None:
    """Listings and what is not there are not kept from before."""
    store = Store(prepared)
    assert store.committed() == {0, 1, 2}
    fs, inner = s3fs.S3FileSystem(skip_instance_cache=True), prepared.removeprefix("s3://")
    fs.rm_file(f"{inner}/commits/000002.json")
    assert store.committed() == {0, 1}
    assert store.commit(2) is None
    fs.pipe_file(f"{inner}/note.txt", b"")
    assert "note.txt" in storage.tree(prepared)


def test_a_store_on_s3_goes_on_after_a_commit_is_lost(s3: str, images: str, clip: Clip) -> None:
    store = encode_rest(request(images, "full"), f"{s3}/s.zarr", clip)
    before = contents(store.path)
    storage.remove_file(f"{store.path}/commits/000001.json")
    assert Store(store.path).committed() == {0, 2}
    assert not verify(VerifyConfig(store=store.path)).trusted
    encode_rest(request(images, "full"), store.path, clip)
    assert contents(store.path) == before
    assert verify(VerifyConfig(store=store.path)).trusted


DAMAGES = ["flip", "cut", "remove"]


@pytest.mark.parametrize("damages", [DAMAGES, *(pytest.param([one] * 3, marks=pytest.mark.slow) for one in DAMAGES)])
def test_damage_on_s3_is_found_and_mended(
    prepared: str, local: dict[str, Store], clip: Clip, damages: list[str]
) -> None:
    """Another file of each shard."""
    for name, damage in zip(("embedding/c/0/0/0", "status/c/1", "pixels/000002.tar"), damages, strict=True):
        path = storage.join(prepared, name)
        data = bytearray(storage.read_bytes(path))
        data[len(data) // 2] ^= 4
        if damage == "remove":
            storage.remove_file(path)
        else:
            storage.write_atomic(path, bytes(data if damage == "flip" else data[:-1]))
    assert verify(VerifyConfig(store=prepared, repair=True)).bad.keys() == {0, 1, 2}
    for shard in range(3):
        encode_shard(Store(prepared), shard, clip)
    assert contents(prepared) == contents(local["full"].path)
    assert verify(VerifyConfig(store=prepared)).trusted


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}"])
def test_damaged_attributes_on_s3_are_refused(prepared: str, data: bytes) -> None:
    storage.write_atomic(f"{prepared}/zarr.json", data)
    with pytest.raises((StoreError, SchemaError)):
        Store(prepared)


@pytest.mark.parametrize("words", [["info", "does not exist"], ["verify", "is no"]])
def test_commands_say_that_there_is_no_store_at_a_url(s3: str, words: list[str]) -> None:
    command, what = words
    result = CliRunner().invoke(cli, [command, f"{s3}/none.zarr"])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {s3}/none.zarr {what}")


def test_a_bucket_that_is_not_there_is_refused_in_one_message(tar: Path, s3: str, clip: Clip) -> None:
    with pytest.raises(DimefmError, match=r"s3://no-such-bucket/s\.zarr\S* cannot be written: "):
        encode_rest(request(str(tar)), "s3://no-such-bucket/s.zarr", clip)


def test_a_store_that_cannot_be_reached_is_one_message(s3: str, tar: Path, clip: Clip) -> None:
    """Whatever the client raises, of zarr's writes too."""
    store = encode_rest(request(str(tar)), f"{s3}/s.zarr", clip)
    with pytest.MonkeyPatch.context() as patch:

        async def refuse(self: Any, method: str, *words: Any, **options: Any) -> Any:
            if method == "put_object":
                raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
            return await call(self, method, *words, **options)

        call = s3fs.S3FileSystem._call_s3
        patch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
        for write in (
            lambda: encode_shard(store, 0, clip),
            lambda: open_or_plan(request(str(tar)), f"{s3}/other.zarr", clip.identity),
            lambda: storage.write_json(f"{s3}/a.json", {}),
            lambda: writing(f"{s3}/b.zarr").__enter__(),
        ):
            with pytest.raises(StoreError, match=rf"{s3}/\S+ cannot be written: Could not connect .*\n  remedy: "):
                write()
    with pytest.raises(StoreError, match="cannot be written: it is read-only"), storage.writing_to("http://h/a"):
        raise NotImplementedError
    with pytest.raises(NotImplementedError), storage.writing_to("/a"):
        raise NotImplementedError


def test_a_store_that_cannot_be_read_is_one_message(s3: str, tmp_path: Path) -> None:
    """Whoever reads it, zarr too, and whatever its client raises, from the first or a later request on."""
    images, _ = random_store(tmp_path / "in" / "i.zarr", rows=8, shard_rows=8)
    texts, _ = random_store(tmp_path / "in" / "t.zarr", rows=8, shard_rows=8, kind="text", seed=1)
    retrieve(images.path, texts.path, index=None, top_k=2, out=str(tmp_path / "in" / "p.zarr"), device="cpu")
    url = upload(tmp_path / "in", s3)
    store, pairs, group = Store(f"{url}/i.zarr"), Pairs(f"{url}/p.zarr"), open_group(f"{url}/i.zarr")
    out = str(tmp_path / "out")
    words = [["verify", f"{url}/i.zarr"], ["build-index", f"{url}/i.zarr", "--out", out]]
    words += [["retrieve", f"{url}/i.zarr", "--texts", f"{url}/t.zarr", "--out", out]]
    words += [["select-texts", f"{url}/p.zarr", "--out", out]]
    words += [["train-student", "--images", f"{url}/i.zarr", "--texts", f"{url}/t.zarr", "--out", out]]
    with pytest.MonkeyPatch.context() as patch:

        async def refuse(self: Any, method: str, *words: Any, **options: Any) -> Any:
            raise error

        patch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
        for error in (EndpointConnectionError(endpoint_url="http://127.0.0.1:9"), NoCredentialsError()):
            said = str(error)
            for command in words:
                result = CliRunner().invoke(cli, command)
                assert result.exit_code == 1
                assert result.output.startswith(f"Error: {url}/")
                assert f"{said}\n  remedy: " in result.output
            for read in (
                lambda: store.shard_arrays(0), pairs.hits, lambda: array_of(group, store.path, "status"),
                lambda: open_group(f"{url}/p.zarr"),
            ):  # fmt: skip
                with pytest.raises(OSError, match=said.split("http")[0]) as caught:
                    read()
                assert str(caught.value.filename).startswith(url)


@pytest.mark.parametrize("name", ["in", "in/*"])
def test_a_key_that_would_be_a_chained_url_is_counted(s3: str, name: str) -> None:
    for key in ("a::b.jpg", "c.jpg"):
        s3fs.S3FileSystem().pipe_file(f"{s3}/in/{key}", b"0")
    account = Account()
    assert [file.path for file in open_image_source([f"{s3}/{name}"], account=account).files()] == [f"{s3}/in/c.jpg"]
    assert [(one.count, one.example) for one in account.skipped()] == [(1, f"{s3}/in/a::b.jpg")]


def test_the_mark_of_a_folder_is_no_stranger(s3: str) -> None:
    fs, inner = fsspec.url_to_fs(s3)
    fs.call_s3("put_object", Bucket=inner, Key="m.zarr/", Body=b"")
    assert storage.listing(f"{s3}/m.zarr") == []
    require_no_stranger(f"{s3}/m.zarr")


def test_files_that_are_written_at_the_same_time_are_all_there(s3: str) -> None:
    """As the tars of two shards that a GPU's worker has under way."""
    names, size = ("a", "b", "c"), 2**20
    with storage.writing_atomically(f"{s3}/{names[0]}") as one:
        one.write(bytes(size))
        with storage.writing_atomically(f"{s3}/{names[1]}") as other:
            other.write(bytes(size))
            assert not storage.listing(s3)
        assert storage.listing(s3) == ["b"]
        with pytest.raises(ZeroDivisionError), storage.writing_atomically(f"{s3}/{names[2]}") as third:
            third.write(bytes(size // 0))
        one.write(b"end")
    assert storage.listing(s3) == ["a", "b"]
    assert storage.read_bytes(f"{s3}/a") == bytes(size) + b"end"
    assert storage.read_bytes(f"{s3}/b") == bytes(size)


# -- several requests at a time ---------------------------------------------------------------------------------------


@pytest.fixture
def distant(s3_requests: S3Requests) -> Iterator[S3Requests]:
    """The server, which answers after a while if it is given a latency."""
    yield s3_requests
    s3_requests.latency = 0.0


def train_images(store: Store) -> None:
    augmentation = Augmentation(size=32, crop_scale=(0.4, 1.0), flip=True, seed=0)
    requests = Requests(Order(store=store, seed=0, batch_size=32), first=0, steps=1)
    assert isinstance(TrainingImages(store.path, augmentation)[next(iter(requests))], Batch)


READS: dict[str, Callable[[Store], object]] = {
    "pixels": lambda store: list(store.pixels(np.arange(32))),
    "training from pixels": train_images,
    "encoding": lambda store: list(
        Loader(store.schema).batches(planned_rows(store.entries(np.arange(32))), 32, threads=4)  # tasks of eight images
    ),
}


@pytest.mark.parametrize("read", READS)
def test_images_are_not_waited_for_one_by_one(images: str, prepared: str, distant: S3Requests, read: str) -> None:
    """By more connections than the ten that botocore has of itself."""
    store = Store(prepared)
    plan = store.entries(np.arange(ROWS))
    plan = plan.set_column(plan.column_names.index("file"), "file", pa.array([images] * ROWS))
    store.entries = lambda rows_N, columns=(): plan.take(rows_N)  # type: ignore[method-assign]
    distant.clear()
    distant.latency = 0.1
    READS[read](store)
    assert distant.at_once > 8  # of 16; a busy machine is late with some


@pytest.mark.slow
def test_images_of_tars_are_read_together_while_training(s3: str, images: str, clip: Clip, distant: S3Requests) -> None:
    store = encode_rest(request(images), f"{s3}/s.zarr", clip)
    distant.clear()
    distant.latency = 0.1
    train_images(store)
    assert distant.at_once > 12


def test_commits_are_read_together(tmp_path: Path, s3: str, distant: S3Requests) -> None:
    random_store(tmp_path / "s.zarr", rows=32, shard_rows=2)
    store = Store(upload(tmp_path / "s.zarr", f"{s3}/s.zarr"))
    distant.clear()
    distant.latency = 0.1
    assert [commit.shard for commit in store.commits()] == list(range(16))
    assert distant.at_once > 12


def test_what_is_read_over_the_network_is_said_with_a_remedy(
    s3: str, images: str, prepared: str, local: dict[str, Store], text_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = local["plain"], Store(prepared)
    assert notes_on_remote_data(Inputs(here, text_store, None, None), [None], "blocks") == []
    (image,) = notes_on_remote_data(Inputs(there, text_store, None, None), [None], "blocks")
    assert image == (
        "each image is a request over the network, and each core that reads makes about 500 of them per second: "
        f"faster with --cache-dir, or a copy of {prepared} on a local disk"
    )
    monkeypatch.setattr("dimefm.store.ranged_array.KEPT_BYTES", 1000)
    far = Inputs(Store(prepared), text_store, None, None)
    _, order = notes_on_remote_data(far, [None], "chunks")
    assert order.startswith(f"rows are drawn from whole chunks of neighbours, since {prepared} is at a URL: ")
    _, order = notes_on_remote_data(far, [None], "blocks")  # of a run that began over a local copy
    assert order.startswith(
        f"rows are drawn from all over {prepared}, as when the run began, and each row is a request "
    )
    monkeypatch.setattr("dimefm.training.text_bank._room_in_memory", lambda: 0)
    texts = Store(upload(Path(text_store.path), f"{s3}/texts.zarr"))
    bank = TextBank(texts, TextMix(), None, seed=0, total=4)
    (sentences,) = notes_on_remote_data(Inputs(here, texts, None, None), [bank], "blocks")
    assert f"copy it ({amount(texts.schema.rows * texts.schema.dim * 2)})" in sentences


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "workers"), [pytest.param("plain", 0, marks=pytest.mark.slow), ("full", 1)])
def test_a_student_is_trained_from_s3_to_the_same_weights(
    s3: str,
    images: str,
    local: dict[str, Store],
    text_store: Store,
    clip: Clip,
    tmp_path: Path,
    kind: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no memory for the sentences: they too are read from there at every step, by the readers' processes."""
    monkeypatch.setattr("dimefm.training.text_bank._room_in_memory", lambda: 0)
    there = encode_rest(request(images, kind), f"{s3}/images.zarr", clip)
    texts = Store(upload(Path(text_store.path), f"{s3}/texts.zarr"))
    train(tiny_config(there, texts, tmp_path / "there", workers=workers))
    train(tiny_config(local[kind], text_store, tmp_path / "here"))
    assert same(weights(tmp_path / "there"), weights(tmp_path / "here"))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_caches_on_ray_from_s3_to_s3(
    s3: str, images: str, local: dict[str, Store], teacher_name: str
) -> None:
    out = f"{s3}/s.zarr"
    sizes = ["--shard-rows", str(SHARD_ROWS), "--batch-size", "8", "--pixels", "64", "--views", "2", "--workers", "1"]
    words = ["cache-images", images, "--teacher", teacher_name, *sizes, "--device", "cpu", "--out", out]
    output = Command(words).finish()
    assert f"{out}: image embeddings" in output
    assert "3 of 3 done" in output
    assert contents(out) == contents(local["full"].path)
    assert "the store can be trusted" in Command(["verify", out, "--sample", "4"]).finish()
