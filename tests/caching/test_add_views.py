"""More views for a finished store: they are what they would have been at once, and none is encoded again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import Status, StrongViews, ViewPlan
from cache_schemas.plan import planned_rows
from dimefm.caching import image_loader, speed
from dimefm.caching.add_views import stores_to_write
from dimefm.caching.canary import check_canary
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.errors import DimefmError, MismatchError, SourceError, StoreError
from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.inspection.describe_store import describe_store, failures_of
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.sources.read_image import read_image
from dimefm.store.embedding_store import Store, opened
from dimefm.training.train import train
from pipeline.cache import CacheConfig, cache, dry_run
from tests.images.test_crops import Spy, planned
from tests.images.test_strong_views import digest
from tests.making import make_jpeg, read_tar, write_tar
from tests.tiny_training import tiny_config

ROWS, FIRST, ALL = 32, 2, 5
BAD = 3  # the row that is no image
PLAN = ViewPlan(count=FIRST, seed=0, crop_scale=(0.4, 1.0), flip=True, strong=StrongViews(), mixup=0.5)
WHOLE = replace(PLAN, count=ALL)
SIDES = [None, 48]


@pytest.fixture(scope="module")
def source(image_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = read_tar(image_tar, ROWS)
    members[list(members)[BAD]] = b"no image"
    return write_tar(tmp_path_factory.mktemp("views") / "images.tar", members)


def write(parts: list[Store], clip: Any) -> None:
    for part in parts:
        for shard in sorted(set(range(part.schema.shards)) - part.committed()):
            encode_shard(part, shard, clip, threads=2)


@pytest.fixture(scope="module")
def grown(source: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, tuple[Store, Store]]:
    """By the side of the pixels: a store of views to which more were added, and one that was made with all."""
    found = {}
    for side in SIDES:
        folder = tmp_path_factory.mktemp("stores")
        store, at_once = (planned(source, folder / f"{p.count}.zarr", clip, side, p) for p in (PLAN, WHOLE))
        write([store, at_once], clip)
        write(stores_to_write(store, WHOLE), clip)
        found[side] = Store(store.path), at_once
    return found


@pytest.fixture
def copy(grown: dict[int | None, tuple[Store, Store]], tmp_path: Path) -> Store:
    """A store to which views were added, to do anything with."""
    shutil.copytree(grown[None][0].path, tmp_path / "copy.zarr")
    return Store(str(tmp_path / "copy.zarr"))


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_added_views_are_those_that_would_have_been_drawn_at_once(
    grown: dict[int | None, tuple[Store, Store]], side: int | None
) -> None:
    store, at_once = grown[side]
    rows = np.arange(ROWS)
    np.testing.assert_array_equal(store.views(rows), at_once.views(rows))
    np.testing.assert_allclose(store.embeddings(rows), at_once.embeddings(rows), atol=2e-3)
    np.testing.assert_allclose(store.read(0, ROWS), at_once.read(0, ROWS), atol=2e-3)
    np.testing.assert_array_equal(store.gather(rows[::-1]), store.read(0, ROWS)[::-1])
    np.testing.assert_array_equal(store.status(), at_once.status())
    views = rows % ALL
    for mine, theirs in zip(store.gather_view(rows, views), (store.embeddings(rows), store.views(rows)), strict=True):
        np.testing.assert_array_equal(mine, theirs[rows, views])
    assert store.schema == replace(at_once.schema, digests=store.schema.digests)
    assert store.contents.good == at_once.contents.good == ROWS - 1


def test_the_identity_is_that_of_all_views_and_the_content_changes_with_them(copy: Store) -> None:
    assert copy.schema.views is not None
    assert copy.schema.views.count == ALL
    before = Store(copy.path, additions=0)
    assert before.schema.views == PLAN
    assert before.schema.identity != copy.schema.identity
    assert before.contents.digest != copy.contents.digest
    shutil.rmtree(Path(copy.path) / "views")
    assert Store(copy.path).contents.digest == before.contents.digest


@pytest.mark.parametrize("side", SIDES)
def test_what_was_there_is_neither_encoded_nor_written_again_and_the_trainer_sees_what_the_teacher_saw(
    source: Path, clip: Clip, tmp_path: Path, side: int | None
) -> None:
    store = planned(source, tmp_path / "s.zarr", clip, side, PLAN)
    first, more = Spy(clip), Spy(clip)
    write([store], first)
    before = {path: path.read_bytes() for path in Path(store.path).rglob("*") if path.is_file()}
    write(stores_to_write(store, WHOLE), more)
    assert {path: path.read_bytes() for path in before} == before
    good = np.delete(np.arange(ROWS), BAD)
    size = clip.identity.preprocessing.size
    taught = ((first, FIRST), (more, ALL - FIRST))
    seen = torch.cat([torch.cat(spy.seen).reshape(ROWS - 1, count, 3, *size) for spy, count in taught], dim=1)
    replayed = torch.stack([trained_on_rows(store.path, good, view, size[0]) for view in range(ALL)], dim=1)
    assert digest(replayed) == digest(seen)


def trained_on_rows(path: str, rows: np.ndarray[Any, Any], view: int, size: int) -> torch.Tensor:
    from dimefm.sources.read_image import ImagePlace
    from dimefm.training.batch_loader import Request
    from dimefm.training.image_batches import Augmentation, Batch, TrainingImages

    store = Store(path)
    images = TrainingImages(store, Augmentation(size=size, crop_scale=(0.1, 0.2), flip=True, seed=3))
    found = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
    for epoch in range(ALL):
        (places,) = np.nonzero((rows + epoch) % ALL == view)
        some = rows[places]
        samples = store.samples(some)
        at = None if store.schema.pixels else [ImagePlace(one["file"], one["offset"], one["size"]) for one in samples]
        batch = images[Request(0, epoch, some, some, at)]
        assert isinstance(batch, Batch), batch
        found[places] = batch.pixels_B3HW
    return found


def test_pixels_are_enough_to_add_views(source: Path, clip: Clip, tmp_path: Path) -> None:
    tar = tmp_path / "images.tar"
    shutil.copy(source, tar)
    store = planned(tar, tmp_path / "s.zarr", clip, 48, PLAN)
    write([store], clip)
    tar.unlink()
    write(stores_to_write(store, WHOLE)[1:], clip)
    assert Store(store.path).schema.views == WHOLE


# -- growing ----------------------------------------------------------------------------------------------------------


def test_views_that_are_not_complete_are_not_read_and_the_same_command_goes_on(copy: Store) -> None:
    (Path(copy.path) / "views" / f"{FIRST:06d}" / "commits" / "000001.json").unlink()
    store = Store(copy.path)
    assert store.schema.views == PLAN
    assert store.additions == ()
    assert [part.path for part in stores_to_write(store, PLAN)] == [store.path]
    parts = stores_to_write(store, WHOLE)
    assert [sorted(part.committed()) for part in parts] == [[0, 1], [0]]
    with pytest.raises(StoreError, match="no longer all the views"):
        opened(copy)
    with pytest.raises(MismatchError, match="5 views were begun, and 3 are asked for"):
        stores_to_write(store, replace(PLAN, count=3))


@pytest.mark.parametrize(
    "at", ["dimefm.store.embedding_store.write_attributes", "dimefm.store.embedding_store.make_commit"]
)
def test_a_kill_while_views_are_added_leaves_a_store_with_those_before(
    source: Path, clip: Clip, tmp_path: Path, at: str
) -> None:
    store = planned(source, tmp_path / "s.zarr", clip, None, PLAN)
    write([store], clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, None)
        with pytest.raises(TypeError, match="not callable"):
            write(stores_to_write(store, WHOLE), clip)
    assert Store(store.path).schema.views == PLAN
    assert verify(VerifyConfig(store=store.path)).trusted
    write(stores_to_write(store, WHOLE), clip)
    assert Store(store.path).schema.views == WHOLE
    assert verify(VerifyConfig(store=store.path)).trusted


def test_views_are_added_to_added_ones(copy: Store, clip: Clip) -> None:
    more = replace(PLAN, count=ALL + 1)
    parts = stores_to_write(copy, more)
    write(parts, clip)
    assert [part.schema.views.first for part in parts if part.schema.views] == [0, FIRST, ALL]
    store = Store(copy.path)
    assert store.schema.views == more
    np.testing.assert_array_equal(store.embeddings(np.arange(ROWS))[:, :ALL], copy.embeddings(np.arange(ROWS)))
    assert store.status().tolist() == copy.status().tolist()
    assert verify(VerifyConfig(store=store.path)).trusted


def test_fewer_views_than_there_are_are_refused(copy: Store, source: Path, clip: Clip) -> None:
    with pytest.raises(MismatchError, match="5 views of each image, and 4 are asked for") as caught:
        planned(source, Path(copy.path), clip, views=replace(PLAN, count=4))
    assert "--views" in str(caught.value.remedy)
    planned(source, Path(copy.path), clip, views=replace(PLAN, count=9))  # which can be added


def test_views_of_another_store_are_refused(copy: Store, source: Path, clip: Clip, tmp_path: Path) -> None:
    other = planned(source, tmp_path / "other.zarr", clip, None, replace(PLAN, seed=1))
    shutil.copytree(Path(copy.path) / "views", Path(other.path) / "views")
    with pytest.raises(StoreError, match="does not hold the views of"):
        Store(other.path)
    moved = tmp_path / "moved.zarr"
    shutil.move(Path(copy.path) / "views" / f"{FIRST:06d}", moved)
    with pytest.raises(StoreError, match="without their plan"):
        Store(str(moved))


def test_the_command_adds_views(image_tar: Path, teacher_name: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "images.tar", read_tar(image_tar, 12))
    config = CacheConfig(kind="image", sources=(str(tar),), out=str(tmp_path / "s.zarr"), teacher=teacher_name)
    config = replace(config, views=1, augment="strong", workers=1, device="cpu")
    first = cache(config)
    said = dry_run(replace(config, views=3))
    assert "2 views of each image added to the 1 that are there" in " ".join(said.split())
    store = cache(replace(config, views=3))
    assert store.schema.views
    assert store.schema.views.count == 3
    commits = [commit.finished for commit in Store(store.path, additions=0).commits()]
    assert commits == [commit.finished for commit in first.commits()]
    assert cache(replace(config, views=3)).contents == store.contents
    with pytest.raises(MismatchError, match="3 views of each image, and 1 "):
        cache(config)


# -- rows that fail ---------------------------------------------------------------------------------------------------


def test_a_row_that_failed_fails_in_added_views_for_the_same_reason(
    grown: dict[int | None, tuple[Store, Store]],
) -> None:
    for store, at_once in grown.values():
        assert [Status(code).name for code in store.status(BAD - 1, BAD + 2)] == ["OK", "UNDECODABLE", "OK"]
        assert list(failures_of(store.path)) == list(failures_of(at_once.path))
        (added,) = store.additions
        assert [f.reason for f in added.failures_in(0).values()] == [f.reason for f in store.failures_in(0).values()]


def test_a_row_that_fails_in_added_views_alone_has_no_embedding(copy: Store) -> None:
    (added,) = copy.additions
    arrays = added.shard_arrays(0)
    failures = list(added.failures_in(0).values())
    arrays["status"][5], arrays["embedding"][5] = Status.NOT_FINITE, 0
    failures.append(replace(failures[0], row=5, status="NOT_FINITE", reason="NaN"))
    added.write_shard(0, arrays, failures, device="cpu", seconds=0.0)
    store = Store(copy.path)
    assert store.status()[5] == Status.NOT_FINITE
    assert store.contents.good == ROWS - 2
    assert sorted(store.failures_in(0)) == [BAD, 5]
    assert describe_store(store.path).facts["status"] == {"NOT_FINITE": 1, "OK": ROWS - 2, "UNDECODABLE": 1}


def test_a_row_that_is_mended_is_encoded_in_added_views_too(clip: Clip, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(make_jpeg(seed=number))
    good = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(b"?" * len(good))
    plan = replace(PLAN, mixup=0.0)
    store = planned(folder, tmp_path / "s.zarr", clip, None, plan)
    write([store], clip)
    parts = stores_to_write(store, replace(plan, count=3))
    write(parts, clip)
    (folder / "1.jpg").write_bytes(good)
    retry_shard(parts[0], 0, clip)
    assert Store(store.path).status().tolist() == [1, 5, 1, 1]
    retry_shard(parts[1], 0, clip)
    assert Store(store.path).status().tolist() == [1, 1, 1, 1]
    assert np.linalg.norm(Store(store.path).embeddings(np.array([1])).astype(float), axis=-1).round(2).tolist() == [
        [1] * 3
    ]


# -- other readers ----------------------------------------------------------------------------------------------------


def test_info_says_what_was_added(copy: Store) -> None:
    described = describe_store(copy.path)
    assert described.facts["added_views"] == [
        {"first": FIRST, "count": ALL - FIRST, "shards_done": 2, "finished": True, "bytes": ROWS * 3 * 128 * 2}
    ]
    assert described.facts["embeddings"]["shape"] == [ROWS, ALL, 128]
    shown = " ".join(described.show().split())
    assert "5 per image, crops of 0.4 to 1 of its area, 2 operations of magnitude 9 and colour jitter, mixed" in shown
    assert "3 views from number 2 on" in shown
    (Path(copy.path) / "views" / f"{FIRST:06d}" / "commits" / "000000.json").unlink()
    assert "not read yet: 1 of 2 shards done" in " ".join(describe_store(copy.path).show().split())


def test_verify_checks_added_views_and_repairs_them_alone(
    copy: Store, source: Path, clip: Clip, teacher_name: str
) -> None:
    report = verify(VerifyConfig(store=copy.path, sample=4, teacher=teacher_name))
    assert report.trusted, report.show()
    assert [len(one.notes) for one in (report, *report.additions)] == [1, 1]
    file = Path(copy.path) / "views" / f"{FIRST:06d}" / "embedding" / "c" / "1" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    report = verify(VerifyConfig(store=copy.path, repair=True))
    assert not report.trusted
    assert not report.bad
    assert list(report.additions[0].bad) == [1]
    assert "checksum" in report.show()
    parts = stores_to_write(copy, WHOLE)
    assert [sorted(part.committed()) for part in parts] == [[0, 1], [0]]
    write(parts, clip)
    assert verify(VerifyConfig(store=copy.path)).trusted
    (Path(copy.path) / "views" / "notes.txt").write_text("mine")
    assert "does not belong to the store" in verify(VerifyConfig(store=copy.path)).show()


def test_an_export_has_the_mean_of_all_views(copy: Store, tmp_path: Path) -> None:
    export_embeddings(copy.path, str(tmp_path / "out"))
    files = sorted((tmp_path / "out" / "img_emb").glob("*.npy"))
    exported = np.concatenate([np.load(file) for file in files])
    np.testing.assert_array_equal(exported, np.delete(copy.read(0, ROWS), BAD, axis=0))


def test_a_student_is_trained_on_all_views(copy: Store, text_store: Store, tmp_path: Path) -> None:
    assert train(tiny_config(copy, text_store, tmp_path / "run", epochs=3)).steps == 3


def test_a_run_that_began_before_views_were_added_says_so(copy: Store, text_store: Store, tmp_path: Path) -> None:
    added = Path(copy.path) / "views"
    added.rename(tmp_path / "views")
    config = tiny_config(Store(copy.path), text_store, tmp_path / "run", max_steps=1)
    train(config)
    (tmp_path / "views").rename(added)
    with pytest.raises(MismatchError, match=f"was begun with 2 views of each image, and {copy.path} has 5 by now"):
        train(replace(config, max_steps=2), allow_changes=("max_steps", "images"))


def test_a_measurement_decodes_fewer_images_the_more_views_they_have(
    grown: dict[int | None, tuple[Store, Store]], clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All views of its images are in memory at once."""
    monkeypatch.setattr(speed, "PROBE_ROWS", 4 * ALL)
    read = list[int]()
    monkeypatch.setattr(image_loader, "read_image", lambda image, **how: read.append(image.row) or b"")
    store = grown[None][1]
    with pytest.raises(SourceError, match="none of the first 4 images"):
        speed.measure(planned_rows(store.plan(0)), store.schema, clip)
    assert set(read) == set(range(4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "strong"}, "--augment has no effect without --views"),
        ({"mixup": 0.2}, "--mixup has no effect without --views"),
        ({"views": 2, "augment": "strong", "view_magnitude": 11}, "strong.magnitude: must be 0 to 10, found 11"),
        ({"views": 2, "mixup": -1.0}, "mixup: must be 0 or more"),
    ],
)
def test_views_that_cannot_be_are_refused_before_anything_is_written(
    source: Path, teacher_name: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = CacheConfig(kind="image", sources=(str(source),), out=str(tmp_path / "s.zarr"), teacher=teacher_name)
    with pytest.raises(DimefmError, match=words):
        cache(replace(config, **changes))
    assert not (tmp_path / "s.zarr").exists()


def test_views_are_not_added_where_those_before_would_come_out_otherwise_now(clip: Clip, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(make_jpeg((120, 90), seed=number))
    plan = replace(PLAN, mixup=0.0)
    store = planned(folder, tmp_path / "s.zarr", clip, None, plan)
    write([store], clip)
    _, added = stores_to_write(store, replace(plan, count=3))
    check_canary(added, clip)
    (folder / "1.jpg").write_bytes(make_jpeg((48, 40), seed=7).ljust((folder / "1.jpg").stat().st_size, b"\0"))
    with pytest.raises(MismatchError, match="encoded again has cosine"):
        check_canary(added, clip)


def test_an_image_that_failed_is_not_read_to_be_mixed_in(
    grown: dict[int | None, tuple[Store, Store]], copy: Store, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one that ends the process which decodes it."""
    (added,) = copy.additions
    read: list[int] = []

    def reading(image: Any, **words: Any) -> Any:
        read.append(image.row)
        return read_image(image, **words)

    monkeypatch.setattr("dimefm.caching.image_loader.read_image", reading)
    (Path(added.path) / "commits" / "000000.json").unlink()
    encode_shard(added, 0, clip)
    assert set(read) == set(range(16)) - {BAD}
    np.testing.assert_array_equal(Store(copy.path).views(np.arange(16)), copy.views(np.arange(16)))
