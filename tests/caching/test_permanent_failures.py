"""Which rows may be left without an embedding: what a user sees of files that are gone, refused or changed since they
were planned, with --accept-missing and without."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cache_schemas import Status
from cache_schemas.plan import SourceFile
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.image_loader import Loaded, Loader
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.same_command import with_gone
from dimefm.cli import cli
from dimefm.datasets.image_set import Records, local_image
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import MismatchError, SourceError, UnreadableError
from dimefm.evaluation.evaluate import EvaluationConfig, evaluate
from dimefm.images.decode import MAX_BYTES, DecodeError
from dimefm.models.clip import Clip
from dimefm.sources import parquet, parquet_cells
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.commit import remove_commit
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from tests.making import make_jpeg, write_parquet, write_tar, write_text, write_tsv

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in three folders."""
    for row in range(COUNT):
        path = tmp_path / "in" / str(row // 4) / f"{row:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(seed=row))
    return tmp_path / "in"


def planned(source: Path, out: Path, clip: Clip, **changes: Any) -> Store:
    words = {"shard_rows": 4, "batch_size": 4, **changes}
    return open_or_plan(PlanRequest(kind="image", arguments=(str(source),), **words), str(out), clip.identity)


def statuses(store: str | Path) -> list[str]:
    return [Status(code).name for code in Store(str(store)).status()]


# -- the command ------------------------------------------------------------------------------------------------------


def run(source: Path, out: Path, teacher_name: str, *more: str) -> Result:
    sizes = ["--shard-rows", "4", "--batch-size", "4", "--workers", "1", "--threads", "1", "--device", "cpu"]
    words = ["cache-images", str(source), "--teacher", teacher_name, "--out", str(out), *sizes, *more]
    return CliRunner().invoke(cli, words)


def test_one_file_of_many_that_is_gone_since_they_were_planned_is_named_and_may_be_accepted(
    folder: Path, tmp_path: Path, clip: Clip, teacher_name: str
) -> None:
    out, gone = tmp_path / "s.zarr", folder / "1" / "06.jpg"
    planned(folder, out, clip)
    times = gone.stat()
    data = gone.read_bytes()
    gone.unlink()
    result = run(folder, out, teacher_name)
    assert result.exit_code == 1
    what = f"the source of {out} has changed since it was planned:\n  - source: {gone} is gone\n"
    assert f"{what}  remedy: put the files back, or leave their rows out by --accept-missing" in result.output
    result = run(folder, out, teacher_name, "--accept-missing")
    assert result.exit_code == 0, result.output
    assert statuses(out) == ["OK"] * 6 + ["MISSING"] + ["OK"] * 5
    result = run(folder, out, teacher_name, "--accept-missing", "--retry-failed")
    assert result.exit_code == 0, result.output
    gone.write_bytes(data)
    os.utime(gone, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(folder, out, teacher_name, "--retry-failed").exit_code == 0
    assert statuses(out) == ["OK"] * COUNT


def test_a_file_that_goes_while_the_command_runs_is_named_with_how_many_and_what_was_finished_is_kept(
    folder: Path, tmp_path: Path, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gone = tmp_path / "s.zarr", folder / "1" / "06.jpg"

    def then_gone(*words: Any, **options: Any) -> Store:
        store = open_or_plan(*words, **options)
        gone.unlink(missing_ok=True)
        return store

    monkeypatch.setattr("pipeline.cache_job.open_or_plan", then_gone)
    result = run(folder, out, teacher_name)
    assert result.exit_code == 1
    what = "Error: 1 of 4 images of a shard were there when they were planned and are gone, the first '1/06': "
    assert result.output.splitlines()[-2].startswith(what)
    assert str(gone) in result.output
    assert result.output.splitlines()[-1].endswith("or leave them out by --accept-missing")
    assert Store(str(out)).committed() == {0}
    assert run(folder, out, teacher_name, "--accept-missing").exit_code == 0
    assert statuses(out).count("MISSING") == 1


def test_a_file_that_was_gone_before_is_no_matter(folder: Path, tmp_path: Path, teacher_name: str) -> None:
    (folder / "1" / "06.jpg").unlink()
    assert run(folder, tmp_path / "s.zarr", teacher_name).exit_code == 0
    assert statuses(tmp_path / "s.zarr") == ["OK"] * (COUNT - 1)


def test_a_file_that_the_command_names_may_be_gone_too(tmp_path: Path, teacher_name: str) -> None:
    tars = [
        write_tar(tmp_path / f"{n}.tar", {f"{n}{row}.jpg": make_jpeg(seed=row) for row in range(4)}) for n in range(3)
    ]
    sources, out = [str(tars[0]), f"{tmp_path}/{{1..2}}.tar"], tmp_path / "s.zarr"
    words = ["--teacher", teacher_name, "--out", str(out), "--device", "cpu", "--workers", "1", "--batch-size", "4"]
    caching = ["cache-images", *words, "--shard-rows", "4"]
    assert CliRunner().invoke(cli, [*caching, *sources]).exit_code == 0
    remove_commit(str(out), 1)
    tars[1].unlink()
    for asked, more in ((sources, []), ([str(tmp_path / "0.rat"), *sources], ["--accept-missing"])):
        result = CliRunner().invoke(cli, [*caching, *asked, *more])
        assert result.exit_code == 1
        assert f"{asked[0] if more else tars[1]} does not exist" in result.output
    result = CliRunner().invoke(cli, [*caching, *sources, "--accept-missing"])
    assert result.exit_code == 0, result.output
    assert statuses(out) == ["OK"] * 4 + ["MISSING"] * 4 + ["OK"] * 4
    remove_commit(str(out), 1)
    tars[0].unlink()
    tars[2].unlink()
    result = CliRunner().invoke(cli, [*caching, *sources, "--accept-missing"])
    assert result.exit_code == 1
    assert "no other file can be read either" in result.output
    assert Store(str(out)).committed() == {0, 2}


def test_gone_files_have_their_old_places_and_others_are_not_accepted(folder: Path, tmp_path: Path, clip: Clip) -> None:
    store = planned(folder, tmp_path / "s.zarr", clip)
    files = [SourceFile(**file) for file in store.source_files().to_pylist()]
    assert with_gone(store, files) == with_gone(store, files[3:7]) == with_gone(store, []) == files
    assert with_gone(store, [files[1], files[0]]) != files
    request = PlanRequest(kind="image", arguments=(str(folder),), shard_rows=4, batch_size=4)
    (folder / "0" / "00.jpg").unlink()
    (folder / "0" / "01.jpg").write_bytes(b"other")
    with pytest.raises(MismatchError, match=r"(?s)00.jpg is gone.*01.jpg has changed") as caught:
        open_or_plan(request, store.path, clip.identity)
    assert "--accept-missing" not in str(caught.value)
    with pytest.raises(MismatchError, match=r"01.jpg has changed"):
        open_or_plan(request, store.path, clip.identity, accept_missing=True)


# -- a shard ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept_missing", [False, True])
def test_a_source_of_which_nothing_is_there_is_never_accepted(
    folder: Path, tmp_path: Path, clip: Clip, accept_missing: bool
) -> None:
    store = planned(folder, tmp_path / "s.zarr", clip)
    folder.rename(tmp_path / "away")
    with pytest.raises(
        UnreadableError, match=r"4 of 4 images of a shard were there when they were planned and are gon"
    ):
        encode_shard(store, 0, clip, accept_missing=accept_missing)
    assert not store.committed()


@pytest.mark.parametrize("size", [0, MAX_BYTES + 1])
@pytest.mark.parametrize("shard_rows", [COUNT, 1])
def test_a_row_that_is_not_read_at_all_does_not_answer_for_the_source(
    folder: Path, tmp_path: Path, clip: Clip, size: int, shard_rows: int
) -> None:
    os.truncate(folder / "1" / "06.jpg", size)
    store = planned(folder, tmp_path / "s.zarr", clip, shard_rows=shard_rows)
    folder.rename(tmp_path / "away")
    with pytest.raises(UnreadableError, match=r"no other file can be read either"):
        encode_shard(store, 0, clip, accept_missing=True)
    assert not store.committed()


def test_blocks_of_parquet_that_were_kept_do_not_answer_for_the_storage(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, url = [{"image": make_jpeg(seed=row)} for row in range(16)], f"memory://{tmp_path}/a.parquet"
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=8)
    storage.write_atomic(url, (tmp_path / "a.parquet").read_bytes())
    monkeypatch.setattr("dimefm.sources.files.URL_BLOCK", 512)
    monkeypatch.setattr(parquet, "_BUFFER", 512)
    request = PlanRequest(kind="image", arguments=(url,), shard_rows=16, batch_size=16)
    store, read = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity), storage.read_bytes

    def expiring(path: str, offset: int = 0, size: int | None = None) -> bytes:
        if path == url:
            raise PermissionError(13, "The token has expired", path)
        return read(path, offset, size)

    parquet_cells.forget_cells()
    assert all(read_encoded(ImagePlace(f"{url}#image", row, 1)) for row in range(8))
    monkeypatch.setattr(storage, "read_bytes", expiring)
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", ())
    with pytest.raises(UnreadableError, match=r"8 of 16 images .* no other file can be read either"):
        encode_shard(store, 0, clip, accept_missing=True)
    assert not store.committed()


def test_a_whole_shard_is_accepted_while_others_are_there(folder: Path, tmp_path: Path, clip: Clip) -> None:
    store = planned(folder, tmp_path / "s.zarr", clip)
    shutil.rmtree(folder / "1")
    assert encode_shard(store, 1, clip, accept_missing=True).counts == {"MISSING": 4}


def test_files_that_are_there_again_are_not_accepted_as_missing(
    folder: Path, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = planned(folder, tmp_path / "s.zarr", clip), storage.read_bytes
    asked: set[str] = set()

    def gone_once(path: str, offset: int = 0, size: int | None = None) -> bytes:
        if path.endswith("02.jpg") and path not in asked:
            asked.add(path)
            raise FileNotFoundError(2, "No such file", path)
        return read(path, offset, size)

    monkeypatch.setattr(storage, "read_bytes", gone_once)
    with pytest.raises(UnreadableError, match=r"1 of 4 .* but .*02.jpg is there again"):
        encode_shard(store, 0, clip, accept_missing=True)


def test_a_refused_file_is_a_row_only_if_it_is_accepted(
    folder: Path, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = planned(folder, tmp_path / "s.zarr", clip), storage.read_bytes

    def refusing(path: str, offset: int = 0, size: int | None = None) -> bytes:
        if path.endswith("02.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return read(path, offset, size)

    monkeypatch.setattr(storage, "read_bytes", refusing)
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0,))
    with pytest.raises(UnreadableError, match=r"02.jpg cannot be read: Permission denied\n  remedy: mend the permissi"):
        encode_shard(store, 0, clip)
    assert encode_shard(store, 0, clip, accept_missing=True).counts == {"MISSING": 1, "OK": 3}


@pytest.mark.parametrize("accept_missing", [False, True])
@pytest.mark.parametrize("kind", ["tar", "tsv", "parquet", "folder"])
def test_a_file_that_shrank_since_it_was_planned_has_changed(
    tmp_path: Path, clip: Clip, kind: str, accept_missing: bool
) -> None:
    images, path = {f"{row}": make_jpeg(seed=row) for row in range(4)}, tmp_path / "in" / f"a.{kind}"
    if kind == "tar":
        write_tar(path, {f"{key}.jpg": data for key, data in images.items()})
    elif kind == "parquet":
        write_parquet(path, [{"key": key, "image": data} for key, data in images.items()])
    elif kind == "tsv":
        write_tsv(path, images)
    else:
        path = tmp_path / "in" / "a.jpg"
        path.parent.mkdir()
        path.write_bytes(images["0"])
    store = planned(path.parent, tmp_path / "s.zarr", clip)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableError, match=rf"changed since it was planned: {path} has changed: .* bytes when"):
        encode_shard(store, 0, clip, accept_missing=accept_missing)
    assert not store.committed()


def test_a_file_of_another_time_whose_images_are_broken_has_changed(tmp_path: Path, clip: Clip) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", {f"{row}.jpg": make_jpeg(seed=row) for row in range(4)})
    store, size = planned(path.parent, tmp_path / "s.zarr", clip), path.stat().st_size
    path.write_bytes(bytes(size))
    os.utime(path, ns=(1, 10**18))
    with pytest.raises(UnreadableError, match=r"a.tar has changed: written .* when it was planned, 2001-09-09"):
        encode_shard(store, 0, clip)


def test_a_tar_that_was_cut_short_before_costs_its_last_row(tmp_path: Path, clip: Clip) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", {f"{row}.jpg": make_jpeg(seed=row) for row in range(4)})
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\xff\xd9") - 100])
    store = planned(path.parent, tmp_path / "s.zarr", clip)
    assert store.schema.source.problems
    assert encode_shard(store, 0, clip).counts == {"OK": 3, "TRUNCATED": 1}


@pytest.mark.parametrize(("rows", "fails"), [(40, True), (8, False)])
def test_many_images_of_which_not_one_can_be_read_are_the_storage(
    tmp_path: Path, clip: Clip, rows: int, fails: bool
) -> None:
    """As from a disk that gives zeros. A few may be bad images, such as those of a short last shard."""
    write_tar(tmp_path / "in" / "a.tar", {f"{row}.jpg": bytes(100) for row in range(rows)})
    store = planned(tmp_path / "in", tmp_path / "s.zarr", clip, shard_rows=64)
    if fails:
        with pytest.raises(
            UnreadableError, match=r"not one of the 40 images of a shard can be read, the first is '0' in"
        ):
            encode_shard(store, 0, clip)
    assert encode_shard(store, 0, clip, accept_missing=fails).counts == {"UNDECODABLE": rows}


# -- sets -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    place = tmp_path / "pets"
    write_text(place / "classnames.txt", ["cat", "dog"])
    write_text(place / "templates.txt", ["a {c}."])
    for row in range(6):
        path = place / ("cat", "dog")[row % 2] / f"{row}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_jpeg(seed=row))
    return place


def test_features_that_an_earlier_version_kept_of_a_bad_moment_are_made_whole(
    labelled: Path, tmp_path: Path, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"model": teacher_name, "folders": (str(labelled),), "device": "cpu"}
    (whole,) = evaluate(EvaluationConfig(**words, out=str(tmp_path / "whole"))).results
    config = EvaluationConfig(**words, out=str(tmp_path / "results"), skip_existing=True)
    images, file = open_folder(str(labelled)), labelled / "dog" / "3.jpg"
    file.rename(tmp_path / "3.jpg")
    with monkeypatch.context() as patch:
        patch.setattr("dimefm.caching.encode_shard.require_permanent", lambda *words, **options: None)  # as it was
        patch.setattr("dimefm.evaluation.evaluate.open_folder", lambda path: images)
        (bad,) = evaluate(config).results
    assert (bad.unreadable, whole.unreadable) == (1, 0)
    (tmp_path / "3.jpg").rename(file)
    (again,) = evaluate(config).results
    assert (again.unreadable, again.metrics) == (0, whole.metrics)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("status", "reason", "lasting"),
    [
        (Status.TOO_LARGE, "memory ran out while it was decoded", False),
        (Status.TOO_LARGE, "900,000,000 pixels", True),
        (Status.CRASHED, "decoding it ends the process: SIGSEGV", None),
    ],
)
def test_an_image_that_failed_by_the_machine_is_tried_again_once_by_a_command(
    labelled: Path,
    tmp_path: Path,
    teacher_name: str,
    monkeypatch: pytest.MonkeyPatch,
    skip: bool,
    status: Status,
    reason: str,
    lasting: bool | None,
) -> None:
    """`lasting` is None where it is tried again, but not by --skip-existing."""
    words: dict[str, Any] = {"model": teacher_name, "folders": (str(labelled),), "device": "cpu", "threads": 1}
    config = EvaluationConfig(**words, out=str(tmp_path / "results"), skip_existing=skip)
    fails, tried, decode = True, list[int](), Loader._decode

    def failing(loader: Loader, data: bytes, row: int) -> Loaded:
        if row == 3:
            tried.append(row)
            if fails:
                raise DecodeError(status, reason)
        return decode(loader, data, row)

    monkeypatch.setattr(Loader, "_decode", failing)
    monkeypatch.setattr("dimefm.caching.encode_planned.without_crashes", lambda rows, *words: rows)
    assert evaluate(config).results[0].unreadable == 1
    again = 0 if lasting or (lasting is None and skip) else 1
    assert evaluate(config).results[0].unreadable == 1
    assert len(tried) == 1 + again
    fails = False
    assert evaluate(config).results[0].unreadable == 1 - again
    assert evaluate(config).results[0].unreadable == 1 - again
    assert len(tried) == 1 + 2 * again


def test_a_set_whose_images_are_on_a_disk_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    samples = [local_image(str(tmp_path / name), str(tmp_path)) for name in ("a.jpg", "b.jpg")]
    with pytest.raises(SourceError, match=r"not one of the 2 images is there, such as .*a\.jpg"):
        Records(where="there", layout="original", samples=samples, files=[], labels=[0, 1]).require()
