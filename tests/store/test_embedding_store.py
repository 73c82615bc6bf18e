"""The store: what is written is what is read, through the library, the memory maps and plain Zarr alike."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from cache_schemas import EmbeddingStore, SchemaError, SourceSummary, Status
from dimefm.errors import StoreError
from dimefm.store.embedding_store import Store
from dimefm.store.mapped_array import MappedArray
from dimefm.store.parquet_tables import write_plan
from dimefm.store.plan_reader import PLANS_KEPT, PlanReader
from dimefm.store.zarr_arrays import create_array
from dimefm.system import storage
from tests.stores import random_store, teacher_identity


def make_array(path: Path, rows: int, chunk: int, shard: int) -> tuple[zarr.Array, np.ndarray]:
    group = zarr.open_group(str(path), mode="a")
    create_array(group, "embedding", (rows, 8), "float16", (chunk, 8), shard)
    values = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float16)
    array = group["embedding"]
    for start in range(0, rows, shard):
        array[start : start + shard] = values[start : start + shard]
    return array, values


@pytest.mark.parametrize(("rows", "chunk", "shard"), [(100, 16, 32), (33, 16, 32), (7, 16, 16), (64, 8, 64)])
def test_maps_and_zarr_read_the_same_rows(tmp_path: Path, rows: int, chunk: int, shard: int) -> None:
    array, values = make_array(tmp_path, rows, chunk, shard)
    mapped = MappedArray.open(str(tmp_path), "embedding", array)
    assert mapped is not None
    chosen = np.random.default_rng(0).integers(0, rows, 200)
    for mine, plain in (
        (mapped.gather(chosen), array.oindex[chosen]),
        (mapped.read(0, rows), array[:]),
        (mapped.read(5, 7), array[5:7]),
        (mapped.gather(np.array([], np.int64)), array[0:0]),
    ):
        np.testing.assert_array_equal(mine, plain)
    np.testing.assert_array_equal(mapped.read(0, rows), values)


def test_rows_that_were_never_stored_are_an_error_and_not_zeros(tmp_path: Path) -> None:
    array, values = make_array(tmp_path, 96, 16, 48)
    values[16:32] = 0
    array.with_config({"write_empty_chunks": False})[0:48] = values[0:48]  # the second chunk is left out of the shard
    (tmp_path / "embedding" / "c" / "1" / "0").unlink()
    mapped = MappedArray.open(str(tmp_path), "embedding", array)
    assert mapped is not None
    np.testing.assert_array_equal(mapped.read(0, 16), values[0:16])
    np.testing.assert_array_equal(mapped.read(32, 48), values[32:48])
    with pytest.raises(StoreError, match="c/0/0, chunk 1 was never written"):
        mapped.read(16, 32)
    with pytest.raises(StoreError, match="c/1/0 is missing"):
        mapped.read(48, 96)


def test_rows_beyond_the_array_are_an_error(tmp_path: Path) -> None:
    array, _ = make_array(tmp_path, 20, 16, 16)
    mapped = MappedArray.open(str(tmp_path), "embedding", array)
    assert mapped is not None
    for rows in ([20], [-1]):
        with pytest.raises(IndexError, match="rows must lie in"):
            mapped.gather(np.array(rows))


def test_a_shard_that_is_cut_short_names_itself(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=64, shard_rows=32)
    file = Path(store.path) / "embedding" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(StoreError, match=r"embedding/c/1/0 is cut short"):
        Store(store.path).read(32, 64)
    np.testing.assert_array_equal(Store(store.path).read(0, 32), store.read(0, 32))


def test_a_read_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system raises it, by a descriptor: without a name."""
    store, _ = random_store(tmp_path / "s.zarr", rows=64, shard_rows=32)

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match=r"Input/output error: '.*s\.zarr/embedding/c/1/0'"):
        store.read(32, 64)
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        storage.read_bytes("/proc/self/mem")  # where nothing is mapped


@pytest.mark.parametrize("left", [0, 1, 4096, -1])
def test_a_shard_that_is_cut_while_it_is_mapped_is_an_error_and_no_crash(tmp_path: Path, left: int) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=512, shard_rows=256)
    np.testing.assert_array_equal(store.gather(np.array([3, 300])), values[[3, 300]])
    file = tmp_path / "s.zarr" / "embedding" / "c" / "1" / "0"
    os.truncate(file, left % file.stat().st_size)
    np.testing.assert_array_equal(store.gather(np.array([3])), values[[3]])
    with pytest.raises(StoreError, match=r"c/1/0 was cut short while it was in use(?s:.*)verify"):
        store.gather(np.array([3, 300]))


def test_samples_of_scattered_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    """Over many chunks and shards, the last one short, with rows asked for twice."""
    store, _ = random_store(tmp_path / "s.zarr", rows=300, shard_rows=32)
    rows = np.random.default_rng(0).integers(0, 300, 500)
    assert 299 in rows
    entries = store.samples(rows)
    assert [(s["row"], s["key"]) for s in entries] == [(row, f"k{row}") for row in rows.tolist()]
    assert list(entries[0]) == ["row", "key", "file", "offset", "size"]
    assert store.samples(rows, ("offset", "file")) == [{n: s[n] for n in ("row", "file", "offset")} for s in entries]
    assert store.samples(np.empty(0, np.int64)) == []


def test_entries_read_each_plan_once_and_keep_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards the rows are of. Names of files, which repeat, are held once."""
    store, _ = random_store(tmp_path / "s.zarr", rows=320, shard_rows=32)
    store, read = Store(store.path), list[int]()
    original = PlanReader._read_table
    monkeypatch.setattr(PlanReader, "_read_table", lambda self, *args: read.append(args[0]) or original(self, *args))
    store = Store(store.path)
    entries = store.entries(np.arange(0, 320, 2), ("file", "offset", "size"))
    assert sorted(read) == list(range(10))
    assert entries["row"].to_pylist() == list(range(0, 320, 2))
    assert pa.types.is_dictionary(entries["file"].type)
    assert entries["file"].num_chunks == 1
    assert entries["file"].chunk(0).dictionary.to_pylist() == ["f"]
    assert store._plans._table.cache_info().currsize == PLANS_KEPT


def test_a_plan_that_lacks_a_column_is_refused_when_that_is_read(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    digest = write_plan(store.path, 0, store.plan(0).drop_columns(["offset"]))
    store = Store(store.path)
    store.schema.digests["rows/000000.parquet"] = digest
    assert store.samples(np.array([3]), ("key",)) == [{"row": 3, "key": "k3"}]
    with pytest.raises(SchemaError, match="offset: missing column"):
        store.samples(np.array([3]), ("offset",))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_chunk_is_checked_once_by_all_processes_that_are_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a child has compared, its parent need not; a shard that is written again is compared again."""
    array, values = make_array(tmp_path, 64, 16, 32)
    mapped = MappedArray.open(str(tmp_path), "embedding", array)
    assert mapped is not None
    child = multiprocessing.get_context("fork").Process(target=mapped.gather, args=(np.array([0, 40]),))
    child.start()
    child.join()
    checked: list[int] = []
    monkeypatch.setattr(mapped, "_check_chunk", lambda shard, file, data, chunk: checked.append(2 * shard + chunk))
    np.testing.assert_array_equal(mapped.gather(np.array([0, 40, 63])), values[[0, 40, 63]])
    assert checked == [3]
    mapped.forget()
    mapped.gather(np.array([0]))
    assert checked == [3, 0]


def test_a_compressed_array_is_read_through_zarr(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path), mode="a")
    array = group.create_array("embedding", shape=(10, 4), dtype="float16", chunks=(5, 4))
    assert MappedArray.open(str(tmp_path), "embedding", array) is None


def test_plain_zarr_reads_what_the_library_wrote(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=70, shard_rows=32)
    plain = zarr.open_group(store.path, mode="r")
    np.testing.assert_array_equal(plain["embedding"][:], values)
    np.testing.assert_array_equal(plain["status"][:], Status.OK)
    np.testing.assert_array_equal(store.read(0, 70), values)
    np.testing.assert_array_equal(store.gather(np.array([69, 0, 31, 32])), values[[69, 0, 31, 32]])
    assert plain.attrs["dimefm"]["rows"] == 70
    assert plain["embedding"].shards == (32, 16)


def test_a_flipped_bit_fails_the_checksum_in_plain_zarr(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    file = Path(store.path) / "embedding" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(store.path, mode="r")["embedding"][:]


def test_only_committed_shards_count(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=64, shard_rows=32)
    (Path(store.path) / "commits" / "000001.json").unlink()
    assert store.committed() == {0}
    with pytest.raises(StoreError, match="1 of 2 shards are done"):
        store.require_complete()


def test_commit_carries_counts_digest_and_failures(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=40, shard_rows=32, failed=(3,))
    first, second = store.commits()
    assert first.counts == {"OK": 31, "UNDECODABLE": 1}
    assert [(f.row, f.status) for f in first.failures] == [(3, "UNDECODABLE")]
    assert second.counts == {"OK": 8}
    assert first.digest != second.digest
    np.testing.assert_array_equal(store.read(3, 4), 0)


def test_damaged_attributes_are_refused_with_every_problem(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    path = Path(store.path) / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["dimefm"]["rows"] = "many"
    document["attributes"]["dimefm"]["teacher"]["weights"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError) as caught:
        Store(store.path)
    assert [p.path for p in caught.value.problems] == ["rows", "teacher.weights"]


@pytest.mark.parametrize("make", ["nothing", "folder", "group"])
def test_what_is_no_store_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x.zarr"
    if make == "folder":
        path.mkdir()
    if make == "group":
        zarr.open_group(str(path), mode="w")
    with pytest.raises(StoreError, match="is not a dimefm store"):
        Store(str(path))


def test_identity_depends_on_teacher_and_source_but_not_on_where_the_teacher_lies() -> None:
    def schema(**teacher: object) -> EmbeddingStore:
        source = SourceSummary(arguments=("a",), files=1, bytes=1, digest="d", repeated_keys=0, problems=())
        return EmbeddingStore(
            kind="image",
            rows=1,
            dim=16,
            chunk_rows=8,
            shard_rows=8,
            batch_size=1,
            teacher=teacher_identity(**teacher),
            source=source,
        )

    assert schema().identity == schema(name="local-dir:/elsewhere").identity
    assert schema().identity != schema(weights="other").identity
