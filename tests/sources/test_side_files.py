"""Planning over tars on S3: what is asked of the server, and side files that say what is in a tar."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dimefm.sources.account import Account
from dimefm.sources.base import split_key
from dimefm.sources.image_sources import open_image_source
from tests.contracts.source_contract import accounted, listed
from tests.making import upload

if TYPE_CHECKING:
    from tests.s3 import S3Requests

pytest_plugins = ["tests.s3"]

Entry = tuple[str, int]
ENTRIES: list[Entry] = [(f"{i // 2:05d}.{('jpg', 'json')[i % 2]}", (30_000, 300)[i % 2]) for i in range(200)]


def write(path: Path, entries: Sequence[Entry] = ENTRIES, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, size in entries:
            member = tarfile.TarInfo(name)
            member.size = size
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.mtime = 0.5 if format == tarfile.PAX_FORMAT else 0  # a pax header for each, as webdataset makes them
            tar.addfile(member, io.BytesIO(os.urandom(size)))
    return path


def regular(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return [member for member in tar if member.isreg()]


def write_idx(path: Path) -> Path:
    """As wds2idx does."""
    shown = [member for member in regular(path) if not member.name.rpartition("/")[2].startswith(".")]
    lines = []
    for _, group in groupby(shown, lambda member: split_key(member.name)[0]):
        parts = [f"{m.name[len(split_key(m.name)[0]) + 1 :]} {m.offset_data} {m.size} {m.name}" for m in group]
        lines.append(" ".join(parts))
    side = path.with_suffix(".idx")
    side.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
    return side


def write_json(path: Path, size: str = "size") -> Path:
    """As hfutils does; webshart calls `size` "length"."""
    files = {member.name: {"offset": member.offset_data, size: member.size, "sha256": "0"} for member in regular(path)}
    side = path.with_suffix(".json")
    side.write_text(json.dumps({"filesize": path.stat().st_size, "hash": "0", "hash_lfs": "0", "files": files}))
    return side


SIDES: dict[str, Callable[[Path], Path]] = {
    "idx": write_idx,
    "json": write_json,
    "webshart": lambda path: write_json(path, "length"),
}


def plan(url: str) -> tuple[list[tuple[object, ...]], list[str]]:
    """The samples without the bucket, and what was reported."""
    samples, reports = listed(open_image_source([url]))
    return [tuple(sample._replace(file=sample.file.rpartition("/")[2])) for sample in samples], reports


def on_disk(folder: Path) -> list[tuple[object, ...]]:
    return plan(str(folder))[0]


def asked(requests: S3Requests, part: str = ".tar") -> tuple[int, int]:
    """Requests, and bytes of the answers."""
    found = requests.of("GET", part)
    return len(found), sum(request[3] for request in found)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("side", SIDES)
def test_by_a_side_file_a_plan_is_the_same_for_a_fraction_of_the_bytes(
    tmp_path: Path, s3: str, s3_requests: S3Requests, side: str, format: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("0.tar", "1.tar"):
        SIDES[side](write(tmp_path / name, format=format))
    url = upload(tmp_path, f"{s3}/tars")
    s3_requests.clear()
    assert plan(url) == (on_disk(tmp_path), [])
    count, size = asked(s3_requests)
    assert count < 2 * 12
    assert size < 2 * 40_000 < (tmp_path / "0.tar").stat().st_size / 20
    assert "2 tars by their side files, 0 by their headers: at most 0 B in 0 requests" in capfd.readouterr().err


def test_folders_hidden_files_and_long_names_beside_the_members_are_looked_at(tmp_path: Path, s3: str) -> None:
    entries = [("a/", 0), ("a/0.jpg", 5000), ("a/._0.jpg", 200), ("a/1.jpg", 700), (f"a/{'n' * 120}.jpg", 900)]
    path = write(tmp_path / "0.tar", entries, tarfile.GNU_FORMAT)
    write_json(path)
    assert plan(upload(tmp_path, f"{s3}/json")) == (on_disk(tmp_path), [])
    path.with_suffix(".json").unlink()
    write_idx(path)  # without the hidden file: its place is room for another
    rows, reports = plan(upload(tmp_path, f"{s3}/idx"))
    assert rows == on_disk(tmp_path)
    assert len(reports) == 1


ADDED = {
    "hard link": ("l.jpg", b"1"),
    "link": ("l.jpg", b"2"),
    "device": ("null", b"3"),
    "unknown": ("m.jpg", b"M"),
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_side_file_that_leaves_out_what_counts_is_not_used(tmp_path: Path, s3: str, added: str, place: int) -> None:
    special = tarfile.TarInfo(ADDED[added][0])
    special.type, special.linkname = ADDED[added][1], ENTRIES[0][0]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for at, (name, size) in enumerate([*ENTRIES[:6], ("end", 0)]):
            if at == place:
                tar.addfile(special)
            if at < 6:
                member = tarfile.TarInfo(name)
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    write_json(path)
    samples, account = accounted(open_image_source([upload(tmp_path, f"{s3}/tars")]))
    expected, own = accounted(open_image_source([str(path)]))
    assert [sample[2:] for sample in samples] == [sample[2:] for sample in expected]
    assert len(samples) == 3 + ("link" in added)
    assert [(one.reason, one.count) for one in account.skipped()] == [(one.reason, one.count) for one in own.skipped()]
    assert len(account.problems) == 1
    assert "0.json does not fit its tar and is not used: " in account.problems[0]


@pytest.mark.parametrize("whole", [True, False])
def test_a_side_file_of_two_tars_in_one_is_used_if_it_names_both(tmp_path: Path, s3: str, whole: bool) -> None:
    path, second = write(tmp_path / "0.tar", ENTRIES[:6]), write(tmp_path / "second", [("x.jpg", 700)])
    small = second.read_bytes()[: 512 + 1024 + 1024]  # no longer than what fills up a record
    if not whole:
        write_idx(path)
    path.write_bytes(path.read_bytes()[:-6144] + small)
    second.unlink()
    if whole:
        side = path.with_suffix(".json")
        places = {sample.key: sample for sample in accounted(open_image_source([str(path)]))[0]}
        files = {f"{key}.jpg": {"offset": one.offset, "size": one.size} for key, one in places.items()}
        files |= {m.name: {"offset": m.offset_data, "size": m.size} for m in regular(path)}
        side.write_text(json.dumps({"filesize": path.stat().st_size, "files": files}))
    rows, problems = plan(upload(tmp_path, f"{s3}/tars"))
    assert rows == on_disk(tmp_path)
    assert [row[0] for row in rows] == ["00000", "00001", "00002", "x"]
    assert len(problems) == (0 if whole else 1)


def test_bytes_after_the_end_are_reported_whether_or_not_there_is_a_side_file(tmp_path: Path, s3: str) -> None:
    path = write(tmp_path / "0.tar", ENTRIES[:6])
    write_idx(path)
    path.write_bytes(path.read_bytes()[:-600] + b"x" * 600)
    rows, problems = plan(upload(tmp_path, f"{s3}/tars"))
    assert rows == on_disk(tmp_path)
    assert "0.idx does not fit its tar and is not used: something follows its last member" in problems[0]
    assert "bytes after its end, from byte" in problems[1]


def test_what_is_counted_is_the_same_by_a_side_file(tmp_path: Path, s3: str) -> None:
    names = ["a.webp", "a.jpg", "a.json", "b", "__MACOSX/c.jpg", "d.left.jpg", "e.jpg"]
    path = write(tmp_path / "0.tar", [(name, 700) for name in names])
    write_json(path)
    account, own = (accounted(open_image_source([place]))[1] for place in (upload(tmp_path, f"{s3}/a"), str(path)))
    assert account.problems == []
    counted = [(one.reason, one.count) for one in account.skipped() if not one.example.endswith("0.json")]
    assert counted == [(one.reason, one.count) for one in own.skipped()]
    assert sum(count for _, count in counted) == 5


CHANGED: dict[str, Sequence[Entry]] = {
    "added": [*ENTRIES, ("x.jpg", 800)],
    "added within": [*ENTRIES[:77], ("x.jpg", 0), *ENTRIES[77:]],
    "removed": ENTRIES[:-1],
    "removed within": [*ENTRIES[:77], *ENTRIES[78:]],
    "resized": [*ENTRIES[:80], (ENTRIES[80][0], 31_000), *ENTRIES[81:]],
    "renamed": [(f"n{name}", size) for name, size in ENTRIES],
    "in another order": ENTRIES[::-1],
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("side", ["idx", "json"])
def test_a_side_file_of_another_version_of_its_tar_is_reported_and_not_used(
    tmp_path: Path, s3: str, side: str, change: str
) -> None:
    SIDES[side](write(tmp_path / "0.tar"))
    write(tmp_path / "0.tar", CHANGED[change])
    rows, reports = plan(upload(tmp_path, f"{s3}/tars"))
    assert rows == on_disk(tmp_path)
    assert len(reports) == 1
    assert f"0.{side} does not fit its tar and is not used: " in reports[0]


@pytest.mark.parametrize(
    ("side", "damage"),
    [
        ("idx", lambda text: text[:3000]),
        ("idx", lambda text: text.replace("v1.2", "v1.1")),
        ("idx", lambda text: text.replace(" 30000 ", " 30000000000000000000000 ", 1)),
        ("idx", lambda text: text.replace("00007.jpg", "a b.jpg")),
        ("idx", lambda text: text.replace("00007.jpg", "\\303\\251.jpg")),
        ("json", lambda text: text.replace('"offset": ', '"offset": 512', 1)),
        ("json", lambda text: text.replace('"offset": ', '"offset": -', 1)),
        ("json", lambda text: text.replace('"offset": ', '"offset": 0.', 1)),
        ("json", lambda text: text.replace('"00007.jpg": ', '"00007.jpg": 1, "x": ', 1)),
        ("json", lambda text: text.replace('"00007.jpg": ', '"\\ud800.jpg": ', 1)),
        ("json", lambda text: text.replace('"files": {', '"files": {}, "x": {', 1)),
    ],
)
def test_a_damaged_side_file_is_reported_and_not_used(
    tmp_path: Path, s3: str, side: str, damage: Callable[[str], str]
) -> None:
    path = SIDES[side](write(tmp_path / "0.tar"))
    path.write_text(damage(path.read_text()))
    rows, reports = plan(upload(tmp_path, f"{s3}/tars"))
    assert rows == on_disk(tmp_path)
    assert len(reports) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.json", b'{"count": 5, "successes": 5}'),
        ("0.json", b"["),
        ("0.json", b"[" * 100_000),
        ("0.idx", os.urandom(800)),
        ("0.idx", b""),
        ("0.tar.idx", bytes(80)),
    ],
)
def test_files_of_other_kinds_are_none_of_ours(tmp_path: Path, s3: str, name: str, content: bytes) -> None:
    write(tmp_path / "0.tar", ENTRIES[:6])
    (tmp_path / name).write_bytes(content)
    assert plan(upload(tmp_path, f"{s3}/tars")) == (on_disk(tmp_path), [])


def test_a_folder_that_may_not_be_listed_has_no_side_files(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(write(tmp_path / "0.tar", ENTRIES[:6]))
    url = upload(tmp_path, f"{s3}/tars")
    source = open_image_source([f"{url}/0.tar"])

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr("s3fs.S3FileSystem.ls", refuse)
    samples, reports = listed(source)
    assert len(samples) == 3
    assert reports == []


# -- headers alone ----------------------------------------------------------------------------------------------------


def test_bodies_larger_than_a_round_trip_carries_are_passed_over(
    tmp_path: Path, s3: str, s3_requests: S3Requests
) -> None:
    """A sample of an image and two small members takes one request of 16 KB."""
    kinds = (("jpg", 1_200_000), ("json", 2000), ("txt", 100))
    write(tmp_path / "0.tar", [(f"{i}.{kind}", size) for i in range(12) for kind, size in kinds])
    url = upload(tmp_path, f"{s3}/tars")
    s3_requests.clear()
    assert plan(url) == (on_disk(tmp_path), [])
    count, size = asked(s3_requests)
    assert count == 13
    assert size < 13 * 16_384 < (tmp_path / "0.tar").stat().st_size / 60


def test_small_members_are_read_through_in_few_requests(tmp_path: Path, s3: str, s3_requests: S3Requests) -> None:
    """A request for each would take longer than their bytes."""
    write(tmp_path / "0.tar", [(f"{i}.jpg", 40_000) for i in range(300)])
    url = upload(tmp_path, f"{s3}/tars")
    s3_requests.clear()
    assert plan(url) == (on_disk(tmp_path), [])
    count, size = asked(s3_requests)
    assert count <= 8
    assert size <= (tmp_path / "0.tar").stat().st_size


def test_what_will_be_read_is_said_first(tmp_path: Path, s3: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("0.tar", "1.tar", "2.tar"):
        write(tmp_path / name, ENTRIES[:40])
    write_idx(tmp_path / "1.tar")
    next(iter(open_image_source([upload(tmp_path, f"{s3}/tars")]).samples(Account())))
    said = capfd.readouterr().err.splitlines()[0]
    assert said == (
        "planning: 0 of 3: 1 tars by their side files, 2 by their headers: at most 1.3 MB in 2 requests, "
        "less where members are larger than 1.0 MB"
    )
