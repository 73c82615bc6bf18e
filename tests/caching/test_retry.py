"""--retry-failed: rows whose images are whole now are encoded, all others stay as they are."""

from __future__ import annotations

import errno
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas import Status, ViewPlan
from cache_schemas.embedding_store import pixels_path
from cache_schemas.plan import PlannedImage
from dimefm.caching import image_loader
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.errors import StoreError, UnreadableError
from dimefm.images.decode import DecodeError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.store.pixel_tar import PixelTar
from dimefm.system import storage
from pipeline.cache import CacheConfig, cache
from pipeline.ray_workers import Job, Worker
from tests.making import make_jpeg, write_tar

COUNT, SHARD_ROWS = 12, 8
VIEWS = ViewPlan(count=3, seed=0, crop_scale=(0.4, 1.0), flip=True)
KINDS: list[dict[str, Any]] = [{}, {"pixels": 32}, {"views": VIEWS}, {"views": VIEWS, "pixels": 32}]
LOST = (1, 6, 9)


def picture_of(row: int) -> bytes:
    return make_jpeg((90 + row, 60), seed=row)


def planned(source: Path, out: Path, clip: Clip, **changes: Any) -> Store:
    words = {"shard_rows": SHARD_ROWS, "batch_size": 4, **changes}
    return open_or_plan(PlanRequest(kind="image", arguments=(str(source),), **words), str(out), clip.identity)


def run(store: Store, clip: Clip, work: Callable[..., Any] = encode_shard, *, accept_missing: bool = False) -> Store:
    for shard in range(store.schema.shards):
        work(store, shard, clip, threads=2, accept_missing=accept_missing)
    return Store(store.path)


def statuses(store: Store) -> list[str]:
    return [Status(code).name for code in store.status()]


def failures(store: Store) -> dict[int, str]:
    return {failure.row: failure.reason for commit in store.commits() for failure in commit.failures}


class Folder:
    """A folder of images, from which some can be taken away and put back as they were."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        for row in range(COUNT):
            self.file(row).write_bytes(picture_of(row))

    def file(self, row: int) -> Path:
        return self.path / f"{row:02d}.jpg"

    def aside(self, row: int) -> Path:
        return self.path.parent / f"{row:02d}.aside"

    def take(self, *rows: int) -> None:
        for row in rows:
            self.file(row).rename(self.aside(row))

    def put_back(self, *rows: int) -> None:
        for row in rows:
            self.aside(row).rename(self.file(row))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "in")


def begun(folder: Folder, out: Path, clip: Clip, **changes: Any) -> Store:
    """A finished store in which the rows LOST are missing."""
    store = planned(folder.path, out, clip, **changes)
    folder.take(*LOST)
    return run(store, clip, accept_missing=True)


def arrays(store: Store) -> dict[str, np.ndarray[Any, Any]]:
    found = [store.shard_arrays(shard) for shard in range(store.schema.shards)]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def tars(store: Store) -> list[bytes]:
    return [(Path(store.path) / pixels_path(shard)).read_bytes() for shard in range(store.schema.shards)]


# -- rows that are whole now ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_a_retried_store_is_the_one_that_never_failed(
    folder: Folder, tmp_path: Path, clip: Clip, changes: dict[str, Any]
) -> None:
    whole = run(planned(folder.path, tmp_path / "whole.zarr", clip, **changes), clip)
    store = begun(folder, tmp_path / "s.zarr", clip, **changes)
    assert [row for row, status in enumerate(statuses(store)) if status == "MISSING"] == list(LOST)
    folder.put_back(*LOST)
    after, expected = arrays(run(store, clip, retry_shard)), arrays(whole)
    for name, values in expected.items():
        if name != "embedding":
            np.testing.assert_array_equal(after[name], values)
    np.testing.assert_allclose(after["embedding"].astype(np.float32), expected["embedding"], atol=1e-3)
    if "pixels" in changes:
        assert tars(store) == tars(whole)


@pytest.mark.parametrize("changes", KINDS)
def test_the_bytes_of_the_other_rows_stay(folder: Folder, tmp_path: Path, clip: Clip, changes: dict[str, Any]) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, **changes)
    before = arrays(store)
    pixels = list(store.pixels(np.arange(COUNT))) if "pixels" in changes else []
    folder.put_back(*LOST)
    after = run(store, clip, retry_shard)
    others = [row for row in range(COUNT) if row not in LOST]
    for name in before.keys() - {"pixel_index"}:
        np.testing.assert_array_equal(arrays(after)[name][others], before[name][others])
    if pixels:
        assert list(after.pixels(np.array(others))) == [pixels[row] for row in others]


def test_a_retry_is_committed_as_a_whole_shard(folder: Folder, tmp_path: Path, clip: Clip) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, pixels=32)
    folder.put_back(*LOST)
    for commit in run(store, clip, retry_shard).commits():
        rows = commit.stop - commit.start
        assert commit.counts == {"OK": rows}
        assert commit.failures == ()
        tar = Path(store.path) / pixels_path(commit.shard)
        names = [f"{row:09d}.jpg" for row in range(commit.start, commit.stop)]
        with tarfile.open(tar) as members:
            assert members.getnames() == names


def test_bytes_written_in_their_place_in_a_tar_are_read(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{row}.jpg": picture_of(row) for row in range(4)})
    store, times = planned(tar, tmp_path / "s.zarr", clip), (tar.stat().st_atime_ns, tar.stat().st_mtime_ns)
    entry = store.plan(0).to_pylist()[2]

    def overwrite(data: bytes) -> None:
        with tar.open("r+b") as file:
            file.seek(entry["offset"])
            file.write(data)
        os.utime(tar, ns=times)

    overwrite(bytes(entry["size"]))
    assert statuses(run(store, clip)) == ["OK", "OK", "UNDECODABLE", "OK"]
    overwrite(picture_of(2))
    again = planned(tar, tmp_path / "s.zarr", clip)  # the source is as it was planned
    assert statuses(run(again, clip, retry_shard)) == ["OK"] * 4


# -- rows that are not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KINDS)
def test_rows_that_fail_again_keep_their_place_and_have_a_reason(
    folder: Folder, tmp_path: Path, clip: Clip, changes: dict[str, Any]
) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, **changes)
    reasons = failures(store)
    folder.put_back(6)
    after = run(store, clip, retry_shard, accept_missing=True)
    expected = ["MISSING" if row in (1, 9) else "OK" for row in range(COUNT)]
    assert statuses(after) == expected
    assert failures(after) == {row: reasons[row] for row in (1, 9)}
    assert not after.embeddings(np.array([1, 9])).any()
    assert after.embeddings(np.array([6])).any()


@pytest.mark.parametrize("changes", KINDS)
def test_rows_that_are_still_gone_leave_their_shard_as_it_was_unless_they_are_accepted(
    folder: Folder, tmp_path: Path, clip: Clip, changes: dict[str, Any]
) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, **changes)
    before = {path: path.read_bytes() for path in Path(store.path).rglob("*") if path.is_file()}
    folder.put_back(6)
    with pytest.raises(UnreadableError, match=r"1 of 8 images .* gone, the first '01': .*\n  remedy: .*--accept-miss"):
        run(store, clip, retry_shard)
    assert {path: path.read_bytes() for path in Path(store.path).rglob("*") if path.is_file()} == before


def test_a_shard_that_was_damaged_since_is_not_retried(folder: Folder, tmp_path: Path, clip: Clip) -> None:
    """Its other rows are kept as they are read: zeros in place of a file that is not there would be kept too."""
    store = begun(folder, tmp_path / "s.zarr", clip)
    folder.put_back(*LOST)
    other = run(planned(folder.path, tmp_path / "other.zarr", clip), clip)
    (Path(other.path) / "status/c/0").replace(Path(store.path) / "status/c/0")
    with pytest.raises(StoreError, match="the arrays of shard 0 are not those that were committed"):
        retry_shard(Store(store.path), 0, clip)


def test_a_row_that_fails_for_another_reason_now_says_that(folder: Folder, tmp_path: Path, clip: Clip) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip)
    size = len(picture_of(6))
    folder.file(6).write_bytes(bytes(size))
    after = run(store, clip, retry_shard, accept_missing=True)
    assert [statuses(after)[row] for row in LOST] == ["MISSING", "UNDECODABLE", "MISSING"]
    assert "06.jpg" not in failures(after)[6]


def test_only_rows_that_failed_are_read(
    folder: Folder, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = begun(folder, tmp_path / "s.zarr", clip, pixels=32), Counter[str]()
    folder.put_back(*LOST)
    really = image_loader.read_image

    def counted(image: PlannedImage, **options: Any) -> bytes | DecodeError:
        read[Path(image.file).name] += 1
        return really(image, **options)

    monkeypatch.setattr(image_loader, "read_image", counted)
    run(store, clip, retry_shard)
    assert read == {f"{row:02d}.jpg": 1 for row in LOST}


def test_a_retry_that_is_stopped_between_tar_and_commit_leaves_no_commit_of_the_old_tar(
    folder: Folder, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit would vouch for places in a tar that is no longer there."""
    store = begun(folder, tmp_path / "s.zarr", clip, pixels=32)
    folder.put_back(*LOST)
    monkeypatch.setattr(Store, "write_shard", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retry_shard(store, 0, clip)
    assert store.committed() == {1}


def test_a_retry_that_is_stopped_while_it_encodes_leaves_the_store_as_it_was(
    folder: Folder, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, pixels=32)
    before = {path: path.read_bytes() for path in Path(store.path).rglob("*") if path.is_file()}
    folder.put_back(*LOST)
    monkeypatch.setattr(PixelTar, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retry_shard(store, 0, clip)
    assert {path: path.read_bytes() for path in Path(store.path).rglob("*") if path.is_file()} == before


def test_a_tar_that_cannot_be_read_is_not_one_that_cannot_be_written(
    folder: Folder, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(folder, tmp_path / "s.zarr", clip, pixels=32)
    folder.put_back(*LOST)

    def read_bytes(path: str, *words: Any, **options: Any) -> bytes:
        if path.endswith(".tar"):
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out", path)
        return really(path, *words, **options)

    really = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    with pytest.raises(StoreError, match=r"0\.tar cannot be read: Connection timed out\n  remedy: "):
        retry_shard(store, 0, clip)


# -- the command ------------------------------------------------------------------------------------------------------


def config(folder: Folder, out: Path, teacher_name: str, **changes: Any) -> CacheConfig:
    words: dict[str, Any] = {"kind": "image", "sources": (str(folder.path),), "out": str(out), "teacher": teacher_name}
    words |= {"shard_rows": SHARD_ROWS, "batch_size": 4, "device": "cpu", "workers": 1, "threads": 1}
    return CacheConfig(**{**words, **changes})


def no_ray(*arguments: object) -> None:
    pytest.fail("Ray was started for nothing")


def test_nothing_to_retry_writes_nothing_and_starts_no_ray(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(planned(folder.path, tmp_path / "s.zarr", clip), clip)
    before = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*") if path.is_file()}
    monkeypatch.setattr("pipeline.ray_workers.cluster", no_ray)
    cache(config(folder, tmp_path / "s.zarr", teacher_name, retry_failed=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_failures_are_left_alone_where_no_retry_is_asked_for(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(folder, tmp_path / "s.zarr", clip)
    folder.put_back(*LOST)
    monkeypatch.setattr("pipeline.ray_workers.cluster", no_ray)
    store = cache(config(folder, tmp_path / "s.zarr", teacher_name))
    assert statuses(store).count("MISSING") == len(LOST)


@pytest.mark.parametrize("accept_missing", [False, True])
def test_a_worker_starts_on_a_shard_in_which_no_image_can_be_read_only_if_that_is_accepted(
    folder: Folder, tmp_path: Path, clip: Clip, teacher_name: str, accept_missing: bool
) -> None:
    """It measures the speed of reading on the first rows, of which here there are none."""
    store = planned(folder.path, tmp_path / "s.zarr", clip)
    folder.take(*range(SHARD_ROWS))
    job = Job(store=store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=None)
    worker = Worker(replace(job, accept_missing=accept_missing))
    if not accept_missing:
        with pytest.raises(UnreadableError, match=r"none of the first 4 images can be read: .*00\.jpg"):
            worker.start(2, 0)
        return
    worker.start(2, 0)
    assert worker.encode(0).counts == {"MISSING": SHARD_ROWS}
