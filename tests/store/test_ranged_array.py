"""Rows of a Zarr array on S3: the same as on a disk, and how much is asked of the server for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from dimefm.errors import StoreError
from dimefm.store import ranged_array
from dimefm.store.mapped_array import MappedArray
from dimefm.store.ranged_array import RangedArray
from dimefm.store.zarr_arrays import create_array
from dimefm.system import storage
from tests.making import upload

if TYPE_CHECKING:
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]

ROWS, CHUNK, SHARD, DIM = 1500, 64, 256, 600  # a chunk has 76,800 bytes
CHUNK_BYTES = CHUNK * DIM * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("array")
    group = zarr.open_group(str(path), mode="a")
    create_array(group, "embedding", (ROWS, DIM), "float16", (CHUNK, DIM), SHARD)
    create_array(group, "status", (ROWS,), "uint8", (SHARD,), SHARD)
    rng = np.random.default_rng(0)
    for name, values in (("embedding", rng.random((ROWS, DIM))), ("status", rng.integers(0, 9, ROWS))):
        array: Any = group[name]
        array.with_config({"write_empty_chunks": True})[:] = values.astype(array.dtype)
    return path


@pytest.fixture
def there(folder: Path, s3: str) -> str:
    return upload(folder, f"{s3}/array")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that is larger than what is kept of one: two chunks."""
    monkeypatch.setattr(ranged_array, "KEPT_BYTES", 2 * CHUNK_BYTES)


def open_both(folder: Path, url: str, name: str = "embedding") -> tuple[MappedArray, RangedArray]:
    mapped = MappedArray.open(str(folder), name, zarr.open_group(str(folder), mode="r")[name])
    fetched = RangedArray.open(url, name, zarr.open_group(url, mode="r")[name])
    assert mapped
    assert fetched
    return mapped, fetched


def data_requests(requests: S3Requests, name: str = "embedding") -> list[tuple[str, str, str, int]]:
    return requests.of("GET", f"{name}/c/")


@pytest.mark.parametrize("name", ["embedding", "status"])
@pytest.mark.parametrize("bound", [0, 3 * CHUNK_BYTES, 1 << 30])
def test_rows_are_those_of_the_disk(
    folder: Path, there: str, name: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged_array, "KEPT_BYTES", bound)
    mapped, fetched = open_both(folder, there, name)
    rng = np.random.default_rng(1)
    for count in (0, 1, 5, 40, 700):
        rows = rng.integers(0, ROWS, count)
        np.testing.assert_array_equal(fetched.gather(rows), mapped.gather(rows))
    for start, stop in ((0, ROWS), (5, 5), (63, 65), (250, 700), (ROWS - 1, ROWS)):
        np.testing.assert_array_equal(fetched.read(start, stop), mapped.read(start, stop))
    for beyond in ([-1], [ROWS]):
        with pytest.raises(IndexError):
            fetched.gather(np.array(beyond))


@pytest.mark.usefixtures("large")
def test_few_rows_are_fetched_alone_and_near_ones_together(folder: Path, there: str, s3_requests: S3Requests) -> None:
    _, fetched = open_both(folder, there)
    rows = np.array([3, 4, 9, 40, 300, 1400])
    s3_requests.clear()
    fetched.gather(rows)
    indices = [request for request in data_requests(s3_requests) if request[3] == 4 * 16 + 4]
    rest = sorted(request[3] // (2 * DIM) for request in data_requests(s3_requests) if request not in indices)
    assert len(indices) == 3  # of three shards, once
    assert rest == [1, 1, 1, 7]
    s3_requests.clear()
    fetched.gather(rows)
    assert len(s3_requests.seen) == 4


@pytest.mark.usefixtures("large")
def test_many_rows_of_a_chunk_are_the_chunk_and_it_is_kept(folder: Path, there: str, s3_requests: S3Requests) -> None:
    mapped, fetched = open_both(folder, there)
    first = np.arange(0, 64, 4)
    fetched.gather(first)
    s3_requests.clear()
    np.testing.assert_array_equal(fetched.gather(first + 1), mapped.gather(first + 1))
    np.testing.assert_array_equal(fetched.gather(np.array([2])), mapped.gather(np.array([2])))
    assert s3_requests.seen == []
    for chunk in (1, 2):  # no more than two are kept
        fetched.gather(first + 64 * chunk)
    s3_requests.clear()
    fetched.gather(first)
    assert len(s3_requests.seen) == 1


def test_a_small_array_is_fetched_once(folder: Path, there: str, s3_requests: S3Requests) -> None:
    _, fetched = open_both(folder, there)
    rng = np.random.default_rng(2)
    s3_requests.clear()
    for _ in range(20):
        fetched.gather(rng.integers(0, ROWS, 100))
    assert len(data_requests(s3_requests)) <= 24 + 6  # chunks, and indices of shards
    assert sum(request[3] for request in s3_requests.seen) < 1.1 * ROWS * DIM * 2


def test_a_read_in_sequence_joins_chunks_and_keeps_only_those_it_cut(
    folder: Path, there: str, s3_requests: S3Requests
) -> None:
    _, fetched = open_both(folder, there)
    s3_requests.clear()
    fetched.read(0, ROWS)
    assert len(data_requests(s3_requests)) == 6 + 6
    s3_requests.clear()
    fetched.read(0, 100)
    fetched.read(100, 128)
    assert len(s3_requests.seen) == 1


def test_small_chunks_are_fetched_once_each(folder: Path, there: str, s3_requests: S3Requests) -> None:
    """As an order does, which asks for the status of a block at a time."""
    _, fetched = open_both(folder, there, "status")
    s3_requests.clear()
    for start in range(0, ROWS, 20):
        fetched.read(start, min(start + 20, ROWS))
    assert len(data_requests(s3_requests, "status")) == 6 + 6


@pytest.mark.parametrize("place", [1000, -30, -2])
@pytest.mark.usefixtures("large")
def test_a_flipped_bit_in_a_chunk_or_an_index_is_an_error(folder: Path, there: str, place: int) -> None:
    _, fetched = open_both(folder, there)
    path = f"{there}/embedding/c/1/0"
    data = bytearray(storage.read_bytes(path))
    data[place] ^= 1
    storage.write_atomic(path, bytes(data))
    fetched.read(0, SHARD)
    for ask in (lambda: fetched.read(SHARD, SHARD + 1), lambda: fetched.gather(np.arange(SHARD, SHARD + 20))):
        with pytest.raises(StoreError, match=r"embedding/c/1/0\S* is damaged: the checksum|its checksum"):
            ask()


@pytest.mark.parametrize("size", [0, 100, CHUNK_BYTES, -1])
def test_a_shard_that_is_cut_short_is_an_error(folder: Path, there: str, size: int) -> None:
    _, fetched = open_both(folder, there)
    path = f"{there}/embedding/c/1/0"
    storage.write_atomic(path, storage.read_bytes(path)[:size])
    with pytest.raises(StoreError, match=r"embedding/c/1/0 is damaged"):
        fetched.gather(np.array([SHARD + 70]))


def test_a_shard_that_is_missing_is_an_error(folder: Path, there: str) -> None:
    _, fetched = open_both(folder, there)
    storage.remove_file(f"{there}/embedding/c/2/0")
    with pytest.raises(StoreError, match=r"embedding/c/2/0 is missing"):
        fetched.gather(np.array([2 * SHARD]))


def test_an_index_elsewhere_than_expected_is_found_by_the_size_of_the_file(folder: Path, there: str) -> None:
    """As of chunks in another order with room between them: the index alone says where they are."""
    mapped, fetched = open_both(folder, there)
    path, step = f"{there}/embedding/c/1/0", CHUNK_BYTES + 4
    data = storage.read_bytes(path)
    entries = np.frombuffer(data[4 * step : -4], np.uint64).reshape(4, 2).copy()
    chunks = [data[at * step : (at + 1) * step] for at in range(4)]
    moved = b"".join(b"gap" + chunks[at] for at in (2, 0, 3, 1))
    entries[[2, 0, 3, 1], 0] = [3 + at * (step + 3) for at in range(4)]
    index = entries.tobytes()
    import google_crc32c

    storage.write_atomic(path, moved + index + google_crc32c.value(index).to_bytes(4, "little"))
    np.testing.assert_array_equal(fetched.read(0, ROWS), mapped.read(0, ROWS))


def test_what_was_kept_is_forgotten_when_a_shard_is_written_again(folder: Path, there: str) -> None:
    _, fetched = open_both(folder, there)
    before = fetched.read(0, 10)
    array: Any = zarr.open_group(there, mode="r+")["embedding"]
    array[0:SHARD] = np.ones((SHARD, DIM), np.float16)
    np.testing.assert_array_equal(fetched.read(0, 10), before)
    fetched.forget()
    assert (fetched.read(0, 10) == 1).all()


def test_it_is_forgotten_by_one_thread_while_another_reads(
    folder: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, fetched = open_both(folder, there)
    runs = RangedArray._runs

    def forgetting(self: RangedArray, chunks: list[int]) -> list[list[int]]:
        self.forget()
        return runs(self, chunks)

    monkeypatch.setattr(RangedArray, "_runs", forgetting)
    np.testing.assert_array_equal(fetched.gather(np.arange(8)), local.gather(np.arange(8)))
