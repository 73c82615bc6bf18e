"""Rows of a Zarr array on S3 through a cache on the disk: the same as without, and what is asked of the server."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from cache_schemas.embedding_store import pixels_path
from dimefm.errors import StoreError
from dimefm.store import cached_array, ranged_array
from dimefm.store.cached_array import CachedArray
from dimefm.store.pixel_reader import PixelReader
from dimefm.store.pixel_tar import pixel_tar
from dimefm.store.zarr_arrays import create_array
from dimefm.system import file_cache, storage
from dimefm.system.cache_room import Room
from dimefm.system.file_cache import FileCache, caching_in
from tests.making import upload
from tests.stores import random_store

if TYPE_CHECKING:
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]

ROWS, CHUNK, SHARD, DIM = 1000, 64, 256, 1200  # a chunk has 153,600 bytes; four shards, the last one not full
CHUNK_BYTES = CHUNK * DIM * 2
SHARD_BYTES = SHARD * DIM * 2


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of this machine is."""
    monkeypatch.setattr(Room, "_kept_free", lambda self: 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("array")
    group = zarr.open_group(str(path), mode="a")
    create_array(group, "embedding", (ROWS, DIM), "float16", (CHUNK, DIM), SHARD)
    array: Any = group["embedding"]
    array[:] = np.random.default_rng(0).random((ROWS, DIM)).astype(np.float16)
    return path


@pytest.fixture(scope="module")
def rows_ND(folder: Path) -> np.ndarray[Any, Any]:
    array: Any = zarr.open_group(str(folder), mode="r")["embedding"]
    return np.asarray(array[:])


@pytest.fixture
def there(folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The array on S3, larger than what a process keeps of one; blocks of the cache are chunks."""
    monkeypatch.setattr(ranged_array, "KEPT_BYTES", 2 * CHUNK_BYTES)
    monkeypatch.setattr(cached_array, "BLOCK", CHUNK_BYTES)
    return upload(folder, f"{s3}/array")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FileCache]:
    with caching_in(str(tmp_path / "cache")) as found:
        assert found
        yield found


def opened(url: str, version: Callable[[int], str] = lambda shard: "first") -> CachedArray:
    found = CachedArray.open(url, "embedding", zarr.open_group(url, mode="r")["embedding"], version)
    assert found
    return found


def data_requests(requests: S3Requests) -> list[tuple[str, str, str, int]]:
    return requests.of("GET", "embedding/c/")


def copies(cache: FileCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.cached"))


def test_rows_are_those_of_the_store_and_are_asked_for_once(
    there: str, cache: FileCache, rows_ND: np.ndarray[Any, Any], s3_requests: S3Requests
) -> None:
    rng = np.random.default_rng(1)
    first = opened(there)
    np.testing.assert_array_equal(first.read(30, 700), rows_ND[30:700])
    rows_N = rng.integers(0, ROWS, 500)
    np.testing.assert_array_equal(first.gather(rows_N), rows_ND[rows_N])
    assert len(copies(cache)) == 4
    s3_requests.clear()
    second = opened(there)  # another run on this machine
    np.testing.assert_array_equal(second.gather(rows_N), rows_ND[rows_N])
    np.testing.assert_array_equal(second.read(0, ROWS), rows_ND)
    assert second.gather(rows_N[:0]).shape == (0, DIM)
    assert not data_requests(s3_requests)


@pytest.mark.usefixtures("cache")
def test_a_few_rows_of_a_chunk_that_is_not_there_are_fetched_alone(
    there: str, rows_ND: np.ndarray[Any, Any], s3_requests: S3Requests
) -> None:
    array = opened(there)
    array.read(0, CHUNK)
    s3_requests.clear()
    rows_N = np.array([300, 5, 900, 63])
    np.testing.assert_array_equal(array.gather(rows_N), rows_ND[rows_N])
    assert sum(request[3] for request in data_requests(s3_requests)) < CHUNK_BYTES // 4


@pytest.mark.usefixtures("cache")
def test_a_shard_that_was_written_again_is_not_taken_from_the_old_copy(
    there: str, rows_ND: np.ndarray[Any, Any]
) -> None:
    opened(there).read(0, ROWS)
    array: Any = zarr.open_group(there, mode="r+")["embedding"]
    array[SHARD : 2 * SHARD] = np.ones((SHARD, DIM), np.float16)
    found = opened(there, lambda shard: "second" if shard == 1 else "first").read(0, ROWS)
    assert (found[SHARD : 2 * SHARD] == 1).all()
    np.testing.assert_array_equal(found[2 * SHARD :], rows_ND[2 * SHARD :])


@pytest.mark.parametrize("place", [1000, SHARD_BYTES + 20, -30, -2], ids=["chunk", "index", "table", "footer"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_copy_is_found_and_fetched_again(
    there: str, cache: FileCache, rows_ND: np.ndarray[Any, Any], s3_requests: S3Requests, place: int, whole: bool
) -> None:
    opened(there).read(0, ROWS)
    copy = copies(cache)[1]
    data = bytearray(copy.read_bytes())
    data[place] ^= 1
    copy.write_bytes(data if whole else data[:-100])
    rows_N = np.arange(0, ROWS, 3)
    for _ in range(3):
        s3_requests.clear()
        np.testing.assert_array_equal(opened(there).gather(rows_N), rows_ND[rows_N])
    assert not data_requests(s3_requests)


def test_a_copy_that_is_damaged_while_it_is_in_use_is_fetched_again(
    there: str, cache: FileCache, rows_ND: np.ndarray[Any, Any]
) -> None:
    array = opened(there)
    array.fetch(np.arange(ROWS // CHUNK + 1))
    with copies(cache)[2].open("r+b") as file:
        file.seek(5)
        file.write(b"damage")
    np.testing.assert_array_equal(array.gather(np.arange(ROWS)), rows_ND)
    copies(cache)[0].unlink()
    np.testing.assert_array_equal(array.read(0, ROWS), rows_ND)


@pytest.mark.usefixtures("cache")
def test_damage_of_the_store_itself_is_an_error_as_without_a_cache(there: str) -> None:
    path = f"{there}/embedding/c/1/0"
    data = bytearray(storage.read_bytes(path))
    data[1000] ^= 1
    storage.write_atomic(path, bytes(data))
    array = opened(there)
    array.read(0, SHARD)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"embedding/c/1/0, chunk 0 is damaged: its checksum does not fit"):
            array.read(0, ROWS)


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_wrong(
    there: str, cache: FileCache, rows_ND: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = file_cache._write, 0

    def half(descriptor: int, data: bytes, offset: int) -> None:
        nonlocal count
        count += 1
        if count == 5:  # a block, after two that are whole
            write(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(file_cache, "_write", half)
        child = get_context("fork").Process(target=lambda: opened(there).read(0, SHARD))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(copies(cache)) == 1
    np.testing.assert_array_equal(opened(there).read(0, ROWS), rows_ND)


@pytest.mark.usefixtures("cache")
def test_two_processes_do_not_fetch_the_same(
    there: str, s3_requests: S3Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_requests, "latency", 0.02)
    s3_requests.clear()
    context = get_context("fork")
    children = [context.Process(target=lambda: opened(there).read(0, ROWS)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert sum(request[3] for request in data_requests(s3_requests)) < 1.05 * ROWS * DIM * 2


def test_the_cache_keeps_to_its_size_and_to_what_was_used_last(
    there: str, tmp_path: Path, rows_ND: np.ndarray[Any, Any], s3_requests: S3Requests
) -> None:
    limit = int(2.6 * SHARD_BYTES)
    with caching_in(str(tmp_path / "small"), limit) as cache:
        assert cache
        array = opened(there)
        for start in range(0, ROWS, SHARD):
            np.testing.assert_array_equal(array.read(start, min(start + SHARD, ROWS)), rows_ND[start : start + SHARD])
            assert sum(path.stat().st_blocks * 512 for path in copies(cache)) <= limit
        s3_requests.clear()
        np.testing.assert_array_equal(array.read(3 * SHARD, ROWS), rows_ND[3 * SHARD :])
        assert not data_requests(s3_requests)
        np.testing.assert_array_equal(array.gather(np.arange(ROWS)), rows_ND)  # more than the cache holds


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_note(
    there: str,
    cache: FileCache,
    rows_ND: np.ndarray[Any, Any],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_cache, "_write", refuse)
    for _ in range(2):
        np.testing.assert_array_equal(opened(there).read(0, ROWS), rows_ND)
    shown = capsys.readouterr().err
    assert shown.count("note:") == 1
    assert f"takes nothing more: {os.strerror(number)}" in shown
    assert not cache.writable


@pytest.mark.usefixtures("cache")
def test_images_come_from_the_cache_where_they_are_there(
    tmp_path: Path, s3: str, s3_requests: S3Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = random_store(tmp_path / "s.zarr", rows=32, shard_rows=16)[0].schema
    index_N3, jpegs = np.zeros((32, 3), np.int64), [bytes([row]) * (300 + row) for row in range(32)]
    for shard in range(2):
        with pixel_tar(str(tmp_path / "s.zarr" / pixels_path(shard))) as tar:
            for row in range(16 * shard, 16 * shard + 16):
                index_N3[row] = tar.add(row, jpegs[row])
    url = upload(tmp_path / "s.zarr", f"{s3}/s.zarr")
    monkeypatch.setattr(file_cache, "BLOCK", 1024)

    reader = PixelReader(url, schema, lambda shard: f"{shard}")
    reader.fetch(np.arange(10), index_N3[:10])
    rows_N = np.array([3, 30, 9, 0])
    s3_requests.clear()
    assert list(reader.jpegs(rows_N, index_N3[rows_N])) == [jpegs[row] for row in rows_N]
    assert len(s3_requests.of("GET", ".tar")) == 1
    (copy,) = Path(tmp_path / "cache").rglob("*.cached")
    with copy.open("r+b") as file:
        file.seek(index_N3[3, 0])
        file.write(b"damage")
    assert list(reader.jpegs(rows_N, index_N3[rows_N])) == [jpegs[row] for row in rows_N]
    assert not copy.exists()
