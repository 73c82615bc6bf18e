"""The tar walker: against tarfile, on what tarfile does not write, and on damage."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm.sources.account import Account
from dimefm.sources.tar import BLOCK, TarMember, tar_members
from dimefm.sources.window import Window

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=120
) | st.from_regex(r"[a-zé/]{90,300}\.jpg", fullmatch=True)
MEMBERS = st.tuples(NAMES, st.integers(0, 3000), st.sampled_from("00007152"))


def members(path: Path) -> list[TarMember]:
    """The members of a tar that must have nothing to report."""
    found, problems = reports(path)
    assert problems == []
    return found


def reports(path: Path) -> tuple[list[TarMember], list[str]]:
    """The members of a tar, and what was reported."""
    account = Account()
    return list(tar_members(str(path), account)), account.problems


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
    assert [member.name for member in members(tmp_path / "a.tar")] == ["b.jpg"]


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
    content = path.read_bytes()[: data.draw(st.integers(0, end + BLOCK - 1))]
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
        patch.setattr("dimefm.sources.window.Window", counting(Window))
        members(path)
    return len(sizes), sum(sizes)


def checked(data: bytearray, header: int) -> bytearray:
    """`data` with the checksum of the header at `header` made right."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    return data
