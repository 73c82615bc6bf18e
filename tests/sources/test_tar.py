"""The tar walker: against tarfile, on what tarfile does not write, and on damage."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm.caching.plan import PlanRequest, forecast
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.files import stat_files
from dimefm.sources.forward_reader import Window, open_window
from dimefm.sources.image_sources import WebDataset
from dimefm.sources.read_image import read_encoded
from dimefm.sources.tar import TarMember, tar_members
from dimefm.sources.tar_headers import BLOCK
from tests.contracts.source_contract import accounted
from tests.store.test_schemas import TEACHER

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=120),
    st.tuples(st.text("abcé/", min_size=1, max_size=9), st.integers(10, 30)).map(
        lambda both: both[0] * both[1] + ".jpg"
    ),
)
MEMBERS = st.tuples(NAMES, st.integers(0, 3000), st.sampled_from("00007152"))


def members(path: Path) -> list[TarMember]:
    """The members of a tar that must have nothing to report."""
    found, problems = reports(path)
    assert problems == []
    return found


def reports(path: Path) -> tuple[list[TarMember], list[str]]:
    """The members of a tar, and what was reported."""
    found, account = listing(path)
    return found, account.problems


def listing(path: Path) -> tuple[list[TarMember], Account]:
    """The members of a tar, and the account of the rest."""
    account = Account()
    return list(tar_members(str(path), account)), account


def write(path: Path, entries: list[tuple[str, int, str]], format: int, **options: object) -> Path:
    """A tar of entries (name, size, type); those that the format cannot hold are left out."""
    with tarfile.open(path, "w", format=format, **options) as tar:
        for name, size, kind in entries:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind.encode(), size
            member.linkname = "elsewhere" if kind in "12" else ""
            try:
                tar.addfile(member, io.BytesIO(b"x" * size) if kind in "0\x007" else None)
            except (ValueError, UnicodeEncodeError):
                continue
    return path


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(MEMBERS, max_size=8), format=st.sampled_from(FORMATS))
def test_members_are_those_that_tarfile_finds(tmp_path: Path, entries: list[tuple[str, int, str]], format: int) -> None:
    path = write(tmp_path / "a.tar", entries, format)
    with tarfile.open(path, "r:") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [tuple(member) for member in members(path)] == expected


def test_before_there_were_letters_a_folder_was_a_name_that_ends_in_a_slash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", 5, "\0"), ("b/", 0, "\0"), ("b/c.jpg", 7, "\0")], tarfile.USTAR_FORMAT)
    assert [(member.name, member.size) for member in members(path)] == [("a.jpg", 5), ("b/c.jpg", 7)]


def test_names_of_every_length_are_whole(tmp_path: Path) -> None:
    names = [f"{'d' * 60}/{'é' * (length // 2)}{length}.jpg" for length in range(0, 400, 7)]
    for format in FORMATS[1:]:
        path = write(tmp_path / f"{format}.tar", [(name, 1, "0") for name in names], format)
        assert [member.name for member in members(path)] == names


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path) -> None:
    names = ["/etc/0.jpg", "../../1.jpg", "a/../2.jpg", "//3.jpg", "C:\\4.jpg"]
    path = write(tmp_path / "a.tar", [(name, 3, "0") for name in names], tarfile.PAX_FORMAT)
    assert [member.name for member in members(path)] == names
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_bytes_of_a_name_that_are_not_utf8_are_shown_and_keep_names_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("caf\xe9.jpg", "caf\xe8.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert [member.name for member in members(path)] == ["caf\\xe9.jpg", "caf\\xe8.jpg"]


def test_global_pax_headers_are_passed_over(tmp_path: Path) -> None:
    headers = {"comment": "made by git archive"}
    path = write(tmp_path / "a.tar", [("é.jpg", 5, "0")], tarfile.PAX_FORMAT, pax_headers=headers)
    assert [member.name for member in members(path)] == ["é.jpg"]


def test_a_size_in_pax_records_is_that_of_the_member(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size, member.pax_headers = 700, {"size": "700"}
    data = bytearray(member.tobuf(tarfile.PAX_FORMAT) + b"x" * 1024)
    header = len(data) - 1024 - BLOCK
    data[header + 124 : header + 136] = b"00000000000\0"
    end = tarfile.TarInfo("b.jpg").tobuf() + bytes(1024)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(checked(data, header)) + end)
    assert [(m.name, m.size) for m in members(path)] == [("a.jpg", 700), ("b.jpg", 0)]


def test_a_size_in_base_256_and_one_without_a_nul_are_read(tmp_path: Path) -> None:
    sizes = {"256.jpg": b"\x80" + (600).to_bytes(11, "big"), "full.jpg": b"%012o" % 600, "spaced.jpg": b"       1130 "}
    data = b""
    for name, field in sizes.items():
        header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        header[124:136] = field.ljust(12, b"\0")
        data += bytes(checked(header, 0)) + b"x" * 1024
    (tmp_path / "a.tar").write_bytes(data + bytes(1024))
    assert [(m.name, m.size) for m in members(tmp_path / "a.tar")] == [(name, 600) for name in sizes]


def test_a_checksum_of_signed_bytes_is_a_checksum_too(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("é.jpg").tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b"%06o\0 " % (int(header[148:154], 8) - 2 * 256)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    assert [member.name for member in members(tmp_path / "a.tar")] == ["é.jpg"]


def test_the_times_that_gnu_keeps_in_the_place_of_a_prefix_are_no_part_of_the_name(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[345:357] = b"14371205203\0"
    (tmp_path / "a.tar").write_bytes(checked(header, 0) + bytes(1024))
    assert [member.name for member in members(tmp_path / "a.tar")] == ["a.jpg"]


def test_sparse_files_are_passed_over_with_their_maps(tmp_path: Path) -> None:
    sparse = bytearray(tarfile.TarInfo("sparse.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157], sparse[482] = b"S", 1
    maps = bytes(504) + b"\1" + bytes(7) + bytes(BLOCK)
    new = tarfile.TarInfo("GNUSparseFile.0/new.jpg")
    new.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "new.jpg"}
    rest = tarfile.TarInfo("b.jpg").tobuf() + bytes(1024)
    (tmp_path / "a.tar").write_bytes(bytes(checked(sparse, 0)) + maps + new.tobuf(tarfile.PAX_FORMAT) + rest)
    found, account = listing(tmp_path / "a.tar")
    assert [member.name for member in found] == ["b.jpg"]
    assert [(one.count, one.example) for one in account.skipped()] == [(2, f"{tmp_path}/a.tar: sparse.jpg")]


# -- links, and members that are no files ---------------------------------------------------------------------------


def linked(path: Path, links: list[tuple[str, str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of a.jpg, of 1 byte, and d/b.jpg, of 2, and after each the half of these links (name, target, type)."""
    with tarfile.open(path, "w", format=format) as tar:
        for size, name in enumerate(("a.jpg", "d/b.jpg"), 1):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
            for link, target, kind in links[size - 1 :: 2]:
                member = tarfile.TarInfo(link)
                member.type, member.linkname = kind, target
                tar.addfile(member)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path, format: int) -> None:
    links = [
        ("hard.jpg", "a.jpg", b"1"),
        ("d/soft.jpg", "b.jpg", b"2"),
        ("d/up.jpg", "../a.jpg", b"2"),
        ("./dotted.jpg", "d/../d/./b.jpg", b"2"),
        ("first.jpg", "second.jpg", b"2"),
        ("second.jpg", "./hard.jpg", b"1"),
        ("/absolute.jpg", "/a.jpg", b"1"),
    ]
    found, account = listing(linked(tmp_path / "a.tar", links, format))
    a, b = found[:2]
    expected = {"hard": a, "d/up": a, "first": a, "/absolute": a, "d/soft": b, "./dotted": b, "second": a}
    assert found[2:] == [member._replace(name=f"{name}.jpg") for name, member in expected.items()]
    assert account.lines() == []


def test_links_to_long_names_are_followed(tmp_path: Path) -> None:
    name = "n" * 90 + "é" * 60 + ".jpg"
    for format in FORMATS[1:]:
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            tar.addfile(tarfile.TarInfo(name))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = b"1", name
            tar.addfile(link)
        assert [member.name for member in members(path)] == [name, "link.jpg"]


def test_links_that_lead_to_no_file_of_the_tar_are_counted(tmp_path: Path) -> None:
    targets = [("gone.jpg", b"1"), ("gone.jpg", b"2"), ("/a.jpg", b"2"), ("../a.jpg", b"2"), ("d", b"2"), ("", b"1")]
    links = [(f"{at}.jpg", target, kind) for at, (target, kind) in enumerate(targets)]
    loop = [("p.jpg", "q.jpg", b"2"), ("q.jpg", "p.jpg", b"2"), ("d/b.jpg", "b.jpg", b"1")]
    found, account = listing(linked(tmp_path / "a.tar", links + loop))
    assert [member.name for member in found] == ["a.jpg", "d/b.jpg"]
    (counted,) = account.skipped()
    assert counted.count == len(links + loop)
    assert counted.reason.startswith("links in tars to what is no file in the same tar")
    assert counted.example == f"{tmp_path}/a.tar: 0.jpg -> gone.jpg"


def test_of_several_files_of_a_name_a_hard_link_means_the_last_before_it(tmp_path: Path) -> None:
    path = linked(tmp_path / "a.tar", [("hard.jpg", "a.jpg", b"1"), ("soft.jpg", "a.jpg", b"2")])
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    sizes = {member.name: member.size for member in members(path)}
    assert (sizes["hard.jpg"], sizes["soft.jpg"]) == (1, 0)


def test_links_before_damage_are_followed(tmp_path: Path) -> None:
    path = linked(tmp_path / "a.tar", [("hard.jpg", "a.jpg", b"1"), ("soft.jpg", "d/b.jpg", b"2")])
    data = bytearray(path.read_bytes())
    data[4 * BLOCK :] = b"x" * BLOCK  # the header of soft.jpg, or of d/b.jpg's data
    path.write_bytes(data)
    found, problems = reports(path)
    assert [member.name for member in found] == ["a.jpg", "d/b.jpg", "hard.jpg"]
    assert len(problems) == 1


def test_devices_pipes_and_unknown_types_are_counted_and_folders_are_not(tmp_path: Path) -> None:
    entries = [("d", 0, "5"), ("a", 0, "3"), ("b", 0, "6"), ("c.jpg", 5, "M"), ("e.jpg", 4, "0")]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, size, kind in entries:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind.encode(), size
            tar.addfile(member, io.BytesIO(b"x" * size))
    found, account = listing(path)
    assert [member.name for member in found] == ["e.jpg"]
    assert account.lines() == [
        f"devices and pipes in tars: 2, such as {path}: a",
        f"members of tars of the unknown type 'M': 1, {path}: c.jpg",
    ]


# -- what is not a tar, or not only one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(bytes(9000), mtime=0), "gzip-compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd-compressed"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b"PAR1" + bytes(600) + b"PAR1", "a Parquet file"),
        (b"<!DOCTYPE html><title>Sign in</title>" * 30, "a page of HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a document of XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "a Git LFS pointer"),
        (b"", "an empty file"),
    ],
)
def test_what_is_called_tar_and_is_not_is_reported_for_what_it_is(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    found, problems = reports(tmp_path / "a.tar")
    assert found == []
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path}/a.tar: not a tar, but {what}")
    with pytest.raises(SourceError, match=f"no image in .*\n  - .*/a.tar: not a tar, but {what}"):
        forecast(PlanRequest(kind="image", arguments=(str(tmp_path),)), TEACHER)


def test_a_damaged_tar_whose_first_name_looks_like_something_else_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("PAR1.jpg", 5, "0")], tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes().replace(b"0000644", b"0000645"))
    assert "broken after 0 members (a damaged header)" in reports(path)[1][0]


@pytest.mark.parametrize("padding", [0, BLOCK, 10_240, 204_800])
def test_tars_one_after_the_other_are_read_as_one(tmp_path: Path, padding: int) -> None:
    headers = {"path": "everywhere.jpg"}  # of the first tar alone
    one = write(tmp_path / "1", [("a.jpg", 700, "0")], tarfile.PAX_FORMAT, pax_headers=headers).read_bytes()
    two = write(tmp_path / "2", [("d", 0, "5"), ("b.jpg", 5, "0")], tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + bytes(padding) + two + bytes(padding))
    found = members(tmp_path / "a.tar")
    assert [(member.name, member.size) for member in found] == [("everywhere.jpg", 700), ("b.jpg", 5)]
    assert found[1].offset == len(one) + padding + 2 * BLOCK


@pytest.mark.parametrize("rest", [b"x", b"a signature" * 100, b"x" * BLOCK + b"0" * 7])
def test_bytes_after_the_end_that_are_no_tar_are_reported_with_their_size(tmp_path: Path, rest: bytes) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", 5, "0")], tarfile.GNU_FORMAT)
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + rest)
    found, problems = reports(path)
    assert [member.name for member in found] == ["a.jpg"]
    assert problems == [f"{path}: the {len(rest):,} bytes after its end, from byte {end:,}, are no tar"]


def test_a_hole_of_zeros_in_the_middle_is_reported(tmp_path: Path) -> None:
    """As a download leaves it that was given up after parts of the file."""
    path = write(tmp_path / "a.tar", [(f"{i}.jpg", 900, "0") for i in range(10)], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[1536:4096] = bytes(4096 - 1536)  # ends within the data of a member
    path.write_bytes(data)
    found, problems = reports(path)
    assert [member.name for member in found] == ["0.jpg"]
    assert problems == [f"{path}: the {len(data) - 4096:,} bytes after its end, from byte 4,096, are no tar"]


def test_an_empty_tar_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [], tarfile.GNU_FORMAT)
    assert listing(path)[1].lines() == [f"empty tars: 1, {path}"]


@pytest.mark.parametrize("place", [0, 100, 124, 148, 156, 257, 345, 511])
def test_one_changed_byte_of_a_header_is_damage(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", 600, "0"), ("b.jpg", 600, "0")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[1536 + place] ^= 1
    path.write_bytes(data)
    found, problems = reports(path)
    assert [member.name for member in found] == ["a.jpg"]
    assert len(problems) == 1
    assert f"{path}: broken after 1 members (a damaged header)" in problems[0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_archive_cut_anywhere_is_reported_and_gives_what_is_before_the_cut(
    tmp_path: Path, data: st.DataObject
) -> None:
    entries = [("a.jpg", 600, "0"), ("é" * 120, 10, "0"), ("c.jpg", 0, "0"), ("d.jpg", 2000, "0")]
    path = write(tmp_path / "a.tar", entries, data.draw(st.sampled_from(FORMATS[1:])))
    whole = members(path)
    end = whole[-1].offset + 2048
    content = path.read_bytes()[: data.draw(st.integers(1, end + BLOCK - 1))]
    path.write_bytes(content)
    found, problems = reports(path)
    assert found == [member for member in whole if member.offset <= len(content)]
    assert len(problems) == 1
    assert f"broken after {len(found)} members" in problems[0]


@pytest.mark.parametrize("records", [b"99 path=x\n", b"9 path\n", b"path=x\n", b"10 path=xy", b"0 =\n"])
def test_pax_records_that_are_none_are_damage(tmp_path: Path, records: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = b"x", len(records)
    member = tarfile.TarInfo("a.jpg").tobuf() + bytes(1024)
    (tmp_path / "a.tar").write_bytes(header.tobuf() + records.ljust(BLOCK, b"\0") + member)
    found, problems = reports(tmp_path / "a.tar")
    assert found == []
    assert "broken after 0 members (a damaged header)" in problems[0]


@settings(max_examples=300, deadline=None)
@given(noise=st.binary(max_size=2000), kind=st.sampled_from(b"0\0LKxXgS5Z"), size=st.integers(-(2**40), 2**70))
def test_no_header_raises_anything(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, kind: int, size: int
) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"%011o" % abs(size))[:11] + b"\0" if size < 2**33 else b"\x80" + size.to_bytes(11, "big")
    header[156] = kind
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    path.write_bytes(bytes(checked(header, 0)) + noise)
    assert len(reports(path)[1]) <= 1


def test_large_members_are_not_read_and_small_ones_not_one_by_one(tmp_path: Path) -> None:
    small = write(tmp_path / "small.tar", [(f"{i}.jpg", 700, "0") for i in range(2000)], tarfile.USTAR_FORMAT)
    large = write(tmp_path / "large.tar", [(f"{i}.jpg", 400_000, "0") for i in range(50)], tarfile.USTAR_FORMAT)
    reads, size = read_through(small)
    assert reads < 40
    assert size < 1.1 * small.stat().st_size
    reads, size = read_through(large)
    assert reads <= 52
    assert size < 0.02 * large.stat().st_size


def test_a_file_system_that_gives_fewer_bytes_than_asked_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tar", [(f"{i}.jpg", 700, "0") for i in range(9)], tarfile.USTAR_FORMAT)
    whole, pread = members(path), os.pread
    monkeypatch.setattr("os.pread", lambda file, size, offset: pread(file, min(size, 300), offset))
    assert members(path) == whole


def test_at_its_end_a_file_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    with open_window(str(tmp_path / "a")) as window:
        assert window.get(4000, 4096) == b"x" * 1000
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr("os.pread")
            assert (window.get(4999, 512), window.get(9000, 512)) == (b"x", b"")


# -- images of a tar --------------------------------------------------------------------------------------------------


def images(path: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """The members that are used of a tar with these, and what is said of the rest."""
    write(path, [(name, at, "0") for at, name in enumerate(names, 1)], tarfile.PAX_FORMAT)
    samples, account = accounted(WebDataset(stat_files([str(path)])))
    return [names[sample.size - 1] for sample in samples], account.lines()


@pytest.mark.parametrize(
    ("extensions", "used"),
    [
        (["webp", "txt", "png", "jpg", "jpeg"], "jpg"),
        (["webp", "jpeg", "png"], "png"),
        (["webp", "JPEG"], "JPEG"),
        (["gif", "json", "bmp"], "gif"),
        (["bmp", "webp"], "webp"),
    ],
)
def test_of_a_sample_with_several_images_one_is_used_and_the_rest_are_counted(
    tmp_path: Path, extensions: list[str], used: str
) -> None:
    names = ["a.png", *(f"b.{extension}" for extension in extensions), "c.jpg"]
    found, lines = images(tmp_path / "a.tar", names)
    assert found == ["a.png", f"b.{used}", "c.jpg"]
    further = [line for line in lines if line.startswith("further images of the same key")]
    count = sum(extension not in ("txt", "json") for extension in extensions) - 1
    assert len(further) == 1
    assert f": {count}, " in further[0]


def test_keys_that_come_again_later_keep_their_own_rows(tmp_path: Path) -> None:
    assert images(tmp_path / "a.tar", ["a.jpg", "b.jpg", "a.png"]) == (["a.jpg", "b.jpg", "a.png"], [])


def test_members_that_are_no_images_are_counted_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    hidden = ["._a.jpg", "d/.b.jpg", "__MACOSX/c.jpg", "d/__MACOSX/c.jpg", ".thumbs/d.jpg", "./.cache/e.jpg"]
    shown = ["./a.jpg", "../b.jpg", "d/c.JPG", "x__MACOSX/d.jpg", ".../e.txt"]
    others = ["f", "g.2019", "h.jpg?w=200", "i.tar", "j.seg.npy", "k.left.jpg"]
    found, lines = images(path, [*hidden, *shown, *others])
    assert found == ["./a.jpg", "../b.jpg", "d/c.JPG", "x__MACOSX/d.jpg"]
    assert sorted(lines) == [
        f"hidden members of tars: 7, such as {path}: ._a.jpg",
        f"members of tars that end in .seg.npy: 1, {path}: j.seg.npy",
        f"members of tars that end in .tar: 1, {path}: i.tar",
        "members of tars without an extension, or with none that is known (call them KEY.jpg, KEY.txt, ...): 3, "
        f"such as {path}: f",
        f"members whose extension has more than one part (a key ends at the first dot): 1, {path}: k.left.jpg",
    ]


def test_a_linked_image_and_one_whose_name_is_not_utf8_read_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        member, link = tarfile.TarInfo("caf\xe9.jpg"), tarfile.TarInfo("tea.jpg")
        member.size, link.type, link.linkname = 5, b"1", "caf\xe9.jpg"
        tar.addfile(member, io.BytesIO(b"image"))
        tar.addfile(link)
    samples, account = accounted(WebDataset(stat_files([str(path)])))
    assert account.lines() == []
    read = {sample.key: read_encoded(sample) for sample in samples}
    assert read == {"caf\\xe9": b"image", "tea": b"image"}


def read_through(path: Path) -> tuple[int, int]:
    """How many reads it takes to list a tar, and of how many bytes."""
    sizes: list[int] = []

    def counting(make: Callable[..., Window]) -> Callable[..., Window]:
        def counted(read: Callable[[int, int], bytes], *limits: int) -> Window:
            def read_and_count(offset: int, size: int) -> bytes:
                data = read(offset, size)
                sizes.append(len(data))
                return data

            return make(read_and_count, *limits)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.sources.forward_reader.Window", counting(Window))
        members(path)
    return len(sizes), sum(sizes)


def checked(data: bytearray, header: int) -> bytearray:
    """`data` with the checksum of the header at `header` made right."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    return data
