"""Planning: which sample is row r is fixed before any work, and found again by the same command."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_schemas import TeacherIdentity
from dimefm.caching.plan import PlanRequest, choose_shard_rows, forecast, open_or_plan
from dimefm.caching.same_command import require_no_stranger
from dimefm.errors import MismatchError, OutputExistsError, SourceError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from tests.making import make_jpeg, write_tar


@pytest.fixture(scope="session")
def teacher(clip: Clip) -> TeacherIdentity:
    return clip.identity


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of five images each; two keys occur in both."""
    write_tar(tmp_path / "in" / "a.tar", {f"{key}.jpg": make_jpeg(seed=key) for key in range(5)})
    write_tar(tmp_path / "in" / "b.tar", {f"{key}.jpg": make_jpeg(seed=10 + key) for key in range(3, 8)})
    return tmp_path / "in"


def of_images(source: object, **changes: Any) -> PlanRequest:
    return PlanRequest(**{"kind": "image", "arguments": (str(source),), "shard_rows": 4, "batch_size": 2} | changes)


def of_texts(*sources: object, **changes: Any) -> PlanRequest:
    return PlanRequest(**{"kind": "text", "arguments": tuple(map(str, sources)), "shard_rows": 4} | changes)


def rows(store: Store) -> list[dict[str, Any]]:
    return [row for shard in range(store.schema.shards) for row in store.plan(shard).to_pylist()]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_store_keeps_the_keys_that_it_was_begun_with(
    tmp_path: Path, teacher: TeacherIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older releases left the extension out of every key."""
    for name in ("1.jpg", "1.png", "2.jpg"):
        (tmp_path / name).write_bytes(make_jpeg())
    request, out = of_images(tmp_path / "*.*g"), str(tmp_path / "s.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("dimefm.sources.image_sources._by_stem", lambda files: ([file] for file in files))
        begun = open_or_plan(request, out, teacher)
    assert begun.schema.source.repeated_keys == 1
    assert [row["key"] for row in rows(open_or_plan(request, out, teacher))] == ["1", "1", "2"]
    new = open_or_plan(request, str(tmp_path / "new.zarr"), teacher)
    assert [row["key"] for row in rows(new)] == ["1.jpg", "1.png", "2"]
    assert new.schema.source.repeated_keys == 0


# -- rows -------------------------------------------------------------------------------------------------------------


def test_row_r_is_the_rth_sample_of_the_source(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    store = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    found = rows(store)
    assert [row["row"] for row in found] == list(range(10))
    assert [row["key"] for row in found] == ["0", "1", "2", "3", "4", "3", "4", "5", "6", "7"]
    assert [Path(row["file"]).name for row in found] == ["a.tar"] * 5 + ["b.tar"] * 5
    assert store.schema.shards == 3
    assert store.plan(2).num_rows == 2
    for row, seed in zip(found, [*range(5), *range(13, 18)], strict=True):
        content = Path(row["file"]).read_bytes()
        assert content[row["offset"] : row["offset"] + row["size"]] == make_jpeg(seed=seed)


def test_repeated_keys_keep_their_rows_and_are_counted(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    store = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    assert store.schema.rows == 10
    assert store.schema.source.repeated_keys == 2


def test_planning_writes_the_facts_of_the_source(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    schema = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher).schema
    assert schema.source.files == 2
    assert schema.source.bytes == sum(len(make_jpeg(seed=s)) for s in [*range(5), *range(13, 18)])
    assert schema.source.arguments == (str(tars),)
    assert (schema.shard_rows, schema.chunk_rows, schema.batch_size) == (4, 4, 2)
    assert schema.teacher == teacher
    assert schema.dim == teacher.embed_dim


def test_repeated_sentences_are_dropped_and_counted(tmp_path: Path, teacher: TeacherIdentity) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none\n\n  two \nthree\n")
    (tmp_path / "b.txt").write_text("three\nfour\nONE\n")
    store = open_or_plan(of_texts(tmp_path / "a.txt", tmp_path / "b.txt"), str(tmp_path / "s.zarr"), teacher)
    assert [row["text"] for row in rows(store)] == ["one", "two", "three", "four", "ONE"]
    assert [row["key"] for row in rows(store)] == ["a.txt:1", "a.txt:2", "a.txt:6", "b.txt:2", "b.txt:3"]
    skipped = {one.reason: one.count for one in store.schema.source.skipped}
    assert skipped == {"repeated sentences": 3, "lines that are blank": 1}
    assert store.schema.source.bytes == len("onetwothreefourONE")


def test_a_broken_tar_is_in_the_plan_as_far_as_it_goes(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    whole = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(whole[: len(whole) // 2])
    store = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    assert 5 < store.schema.rows < 10
    assert [row["key"] for row in rows(store)][-5:] == ["3", "4", "5", "6", "7"]
    assert len(store.schema.source.problems) == 1
    assert "a.tar: broken after" in store.schema.source.problems[0]


def test_two_plans_of_one_source_are_the_same_bytes(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    open_or_plan(of_images(tars), str(tmp_path / "one.zarr"), teacher)
    open_or_plan(of_images(tars), str(tmp_path / "two.zarr"), teacher)
    assert all_files(tmp_path / "one.zarr") == all_files(tmp_path / "two.zarr")


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "text"])
def test_shard_rows_grow_with_the_source_in_powers_of_two(kind: str) -> None:
    sizes = [0, 1, *(int(1.3**n) for n in range(120))]
    chosen = [choose_shard_rows(size, kind) for size in sorted(sizes)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 512
    assert chosen[-1] == 65536
    assert all(n & (n - 1) == 0 for n in chosen)
    assert set(chosen) == {512 << i for i in range(8)}


def test_shard_rows_are_chosen_where_none_are_given(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    store = open_or_plan(of_images(tars, shard_rows=None), str(tmp_path / "s.zarr"), teacher)
    assert store.schema.shard_rows == 512
    assert store.schema.shards == 1


# -- the same command again -------------------------------------------------------------------------------------------


def test_the_same_command_finds_its_store_and_changes_nothing(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    first = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    before = all_files(tmp_path / "s.zarr")
    again = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), replace(teacher, name="moved", pretrained="x"))
    assert again.schema == first.schema
    assert all_files(tmp_path / "s.zarr") == before


def refused(request: PlanRequest, out: Path, teacher: TeacherIdentity) -> str:
    before = all_files(out)
    with pytest.raises(MismatchError) as caught:
        open_or_plan(request, str(out), teacher)
    assert caught.value.remedy
    assert all_files(out) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"), [({"shard_rows": 8}, "shard_rows: 4 != 8"), ({"batch_size": 3}, "batch_size: 2 != 3")]
)
def test_another_setting_is_refused_by_its_name(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity, change: dict[str, Any], field: str
) -> None:
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    message = refused(of_images(tars, **change), tmp_path / "s.zarr", teacher)
    assert field in message
    assert message.count("\n  - ") == 1


def test_another_source_is_refused_by_its_name(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    message = refused(of_images(tars / "a.tar"), tmp_path / "s.zarr", teacher)
    assert f"source: {tars}/b.tar is gone" in message
    assert message.count("\n  - ") == 1
    write_tar(tmp_path / "c.tar", {"0.jpg": make_jpeg()})
    more = of_images(tars, arguments=(str(tars), str(tmp_path / "c.tar")))
    message = refused(more, tmp_path / "s.zarr", teacher)
    assert f"source: {tmp_path}/c.tar is new" in message
    assert "name only the files that it was planned from" in message
    write_tar(tars / "d\n  - all is lost.tar", {"0.jpg": make_jpeg()})
    assert refused(of_images(tars), tmp_path / "s.zarr", teacher).count("\n  - ") == 1


def test_a_file_of_another_size_is_refused_with_both(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    before = (tars / "b.tar").stat().st_size
    write_tar(tars / "b.tar", {"larger.jpg": make_jpeg((900, 700))})
    message = refused(of_images(tars), tmp_path / "s.zarr", teacher)
    after = (tars / "b.tar").stat().st_size
    assert f"{tars}/b.tar has changed: {before:,} bytes when it was planned, {after:,} now" in message


def test_a_file_written_again_is_refused_with_both_times(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    os.utime(tars / "b.tar", (1_000_000_000, 1_000_000_000))
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    os.utime(tars / "b.tar", (1_000_000_000, 1_000_000_001))
    message = refused(of_images(tars), tmp_path / "s.zarr", teacher)
    times = "written 2001-09-09 01:46:40.000+00:00 when it was planned, 2001-09-09 01:46:41.000+00:00 now"
    assert f"{tars}/b.tar has changed: {times}" in message
    assert message.count("\n  - ") == 1


def test_files_put_back_with_their_times_are_the_same_source(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    store = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    shutil.copytree(tars, tmp_path / "copy")
    shutil.rmtree(tars)
    (tmp_path / "copy").rename(tars)
    assert open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher).schema == store.schema


def test_of_many_changed_files_a_few_are_named_and_the_rest_counted(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    open_or_plan(of_images(tars / "a.tar"), str(tmp_path / "s.zarr"), teacher)
    for number in range(9):
        write_tar(tars / f"n{number}.tar", {"0.jpg": make_jpeg()})
    message = refused(of_images(tars), tmp_path / "s.zarr", teacher)
    assert message.count(" is new") == 3
    assert "source: and 7 more" in message


def test_the_same_files_in_another_order_are_refused(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    one, other = str(tars / "a.tar"), str(tars / "b.tar")
    open_or_plan(of_images(tars, arguments=(one, other)), str(tmp_path / "s.zarr"), teacher)
    message = refused(of_images(tars, arguments=(other, one)), tmp_path / "s.zarr", teacher)
    assert "source: the files are given in another order" in message


def test_another_teacher_is_refused_with_every_field_that_differs(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    other = replace(teacher, weights="0" * 64, precision="bf16")
    message = refused(of_images(tars), tmp_path / "s.zarr", other)
    assert "teacher.weights: " in message
    assert "teacher.precision: fp32 != bf16" in message
    assert message.count("\n  - ") == 2


def test_another_kind_is_refused(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher)
    message = refused(of_texts(tmp_path / "a.txt"), tmp_path / "s.zarr", teacher)
    assert "kind: image != text" in message
    assert "was made by another command" in message


def test_a_folder_of_something_else_is_refused_and_left_alone(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("x")
    with pytest.raises(OutputExistsError, match=r"'chapter-1\.tex'") as caught:
        open_or_plan(of_images(tars), str(tmp_path / "thesis"), teacher)
    assert caught.value.remedy
    assert list(all_files(tmp_path / "thesis")) == ["chapter-1.tex"]


def test_what_zarr_left_unfinished_is_no_stranger(tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    out.mkdir()
    (out / f"zarr.{'0f' * 16}.partial").write_bytes(b"{")  # as a disk that was full leaves it
    require_no_stranger(str(out))
    (out / "chapter.partial").touch()
    with pytest.raises(OutputExistsError, match=r"'chapter\.partial'"):
        require_no_stranger(str(out))


def test_a_file_at_the_output_is_refused_and_left_alone(tars: Path, tmp_path: Path, teacher: TeacherIdentity) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputExistsError):
        open_or_plan(of_images(tars), str(tmp_path / "out"), teacher)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_plan_that_was_stopped_before_its_attributes_is_made_again(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    out = tmp_path / "s.zarr"
    open_or_plan(of_images(tars), str(out), teacher)
    whole = all_files(out)
    group = json.loads((out / "zarr.json").read_text())
    (out / "zarr.json").write_text(json.dumps(group | {"attributes": {}}))
    (out / "rows" / "000002.parquet").write_bytes(b"cut off")
    assert open_or_plan(of_images(tars), str(out), teacher).schema.rows == 10
    assert all_files(out) == whole


def test_a_plan_that_was_stopped_among_its_rows_is_made_again(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    out = tmp_path / "s.zarr"
    open_or_plan(of_images(tars), str(tmp_path / "whole.zarr"), teacher)
    (out / "rows").mkdir(parents=True)
    (out / "rows" / "000000.parquet").write_bytes(b"of an earlier source")
    open_or_plan(of_images(tars), str(out), teacher)
    assert all_files(out) == all_files(tmp_path / "whole.zarr")


def test_rows_left_by_a_longer_plan_that_was_stopped_do_no_harm(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    out = tmp_path / "s.zarr"
    (out / "rows").mkdir(parents=True)
    (out / "rows" / "000007.parquet").write_bytes(b"of an earlier source")
    store = open_or_plan(of_images(tars), str(out), teacher)
    assert len(rows(store)) == store.schema.rows == 10


# -- nothing to plan --------------------------------------------------------------------------------------------------


def test_a_source_without_a_sample_is_refused(tmp_path: Path, teacher: TeacherIdentity) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"a caption alone"})
    (tmp_path / "a.txt").write_text("\n \n")
    for request in (of_images(tmp_path / "a.tar"), of_texts(tmp_path / "a.txt")):
        with pytest.raises(SourceError, match=f"no {request.kind} in ") as caught:
            open_or_plan(request, str(tmp_path / "s.zarr"), teacher)
        assert caught.value.remedy
        with pytest.raises(SourceError, match=f"no {request.kind} in "):
            forecast(request, teacher)
        assert not (tmp_path / "s.zarr").exists() or not all_files(tmp_path / "s.zarr")


def test_a_forecast_says_what_the_plan_will_be_and_writes_nothing(
    tars: Path, tmp_path: Path, teacher: TeacherIdentity
) -> None:
    before = all_files(tmp_path)
    found = forecast(of_images(tars), teacher, keep=7)
    assert all_files(tmp_path) == before
    schema = open_or_plan(of_images(tars), str(tmp_path / "s.zarr"), teacher).schema
    assert found.schema == replace(schema, digests={})
    assert found.bytes_out == 10 * (2 * teacher.embed_dim + 1)
    assert [entry.key for entry in found.first] == ["0", "1", "2", "3", "4", "3", "4"]


def test_a_home_folder_is_the_same_store_again(
    tars: Path, teacher: TeacherIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~ is not always expanded by the shell; planned again at another place, a finished store would be lost."""
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_or_plan(of_images(tars), "~/i.zarr", teacher)
    assert store.path == str(tmp_path / "i.zarr")
    before = all_files(tmp_path / "i.zarr")
    assert open_or_plan(of_images(tars), "~/i.zarr", teacher).path == store.path
    assert all_files(tmp_path / "i.zarr") == before
    with pytest.raises(OutputExistsError, match="is a store already"):
        Store.create(store.path, store.schema)


def test_a_plan_that_was_stopped_leaves_no_rows_behind(tars: Path, teacher: TeacherIdentity, tmp_path: Path) -> None:
    left = tmp_path / "i.zarr" / "rows" / "000099.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a longer source")
    open_or_plan(of_images(tars), str(tmp_path / "i.zarr"), teacher)
    assert not left.exists()


@pytest.mark.parametrize("document", ["{}", None])
def test_commits_without_attributes_are_not_planned_over(
    tars: Path, teacher: TeacherIdentity, tmp_path: Path, document: str | None
) -> None:
    commits = tmp_path / "i.zarr" / "commits"
    commits.mkdir(parents=True)
    (commits / "000000.json").write_text("{}")
    if document is not None:
        (tmp_path / "i.zarr" / "zarr.json").write_text(document)
    with pytest.raises(OutputExistsError, match="finished shards but no attributes"):
        open_or_plan(of_images(tars), str(tmp_path / "i.zarr"), teacher)


def test_shards_are_whole_chunks(tars: Path, teacher: TeacherIdentity, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"5,000 rows are not whole chunks"):
        open_or_plan(of_images(tars, shard_rows=5000), str(tmp_path / "i.zarr"), teacher)
    assert not (tmp_path / "i.zarr").exists()


def test_a_source_given_twice_is_refused(tars: Path, teacher: TeacherIdentity, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.tar is given more than once"):
        open_or_plan(
            PlanRequest(kind="image", arguments=(str(tars), str(tars / "a.tar"))), str(tmp_path / "i"), teacher
        )
