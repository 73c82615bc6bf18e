"""The members of a tar, by its headers alone.

The standard library's tarfile takes nine times as long per member, and plans have 40 million of them. This reads what
tar, GNU tar and Python write: v7, ustar, GNU and pax headers. Nothing is ever extracted, so a member's name is only a
name, whatever it holds.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from dimefm.sources.account import Account
from dimefm.sources.forward_reader import Window, open_window
from dimefm.sources.tar_headers import (
    BLOCK,
    DEVICES,
    EXTENSIONS,
    FILES,
    FOLDERS,
    HARD_LINK,
    LONG_NAME,
    LONG_TARGET,
    PAX_OF_ALL,
    SPARSE,
    SYMBOLIC_LINK,
    WITHOUT_DATA,
    DamagedTarError,
    decode_name,
    end_of_data,
    is_header,
    name_in,
    number_in,
    pax_records,
    until_nul,
)
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage
from dimefm.system.first_bytes import HEAD_BYTES, describe

_ZEROS = bytes(BLOCK)
_MOST_LINKS = 40  # that lead to one another, as in Linux
_ZEROS_READ = 1 << 16  # bytes that are looked through at a time for what follows the end mark
_MOST_EXTENSION = 1 << 22  # bytes of a long name or of pax records; more than that is damage


class TarMember(NamedTuple):
    """A regular file in a tar: the bytes [offset, offset + size) of it. A byte of a name that is not UTF-8 becomes
    \\xNN."""

    name: str
    offset: int
    size: int


class _Link(NamedTuple):
    """A member that stands for another; its header ends at `position`."""

    name: str
    target: str
    hard: bool
    position: int


@dataclass
class _Listing:
    """What a walk over a tar finds beside its regular files."""

    path: str
    account: Account = field(default_factory=Account)
    count: int = 0
    """Regular files until now."""
    links: list[_Link] = field(default_factory=list)

    def note_other(self, kind: bytes, name: str, target: str, position: int, sparse: bool) -> None:
        """Note a member that is no regular file: a link to `target`, a folder, or something that is not used."""
        if kind in (HARD_LINK, SYMBOLIC_LINK):
            self.links.append(_Link(name, target, kind == HARD_LINK, position))
        elif kind not in FOLDERS:
            self.account.skip(_why_not_used(kind, sparse), f"{self.path}: {name}")


class _TrailingBytesError(DamagedTarError):
    """The end mark is followed, at this place, by something that is no tar."""

    def __init__(self, position: int) -> None:
        self.position = position
        super().__init__()


def tar_members(path: str, account: Account) -> Iterator[TarMember]:
    """Regular files in a tar, in order, and after them those that links stand for, if they are in the same tar.

    Several tars in a row in a file are read as one. Other links, devices and sparse files are counted in `account`.
    What follows a broken header is lost, which is a problem there, and so are bytes after the end that are no tar.
    Raises SourceError where the file cannot be read.

    Small members are read through in large blocks, and large ones (64 KB; at a URL 1 MB) are leapt over. A tar with
    links is gone through twice.
    """
    listing = _Listing(path, account)
    try:
        with open_window(path) as window:
            try:
                yield from _walk(window, listing)
            except DamagedTarError as error:
                account.problem(f"{path}: {_describe_damage(window, listing, error)}")
            if listing.links:
                yield from _linked_files(window, listing)
    except OSError as error:
        raise cannot_read(path, error) from error


def first_member_between(path: str, start: int, stop: int) -> TarMember | None:
    """The first regular file of a tar, if its headers begin at `start` and end by `stop`. None where the tar ends at
    `start`, or where a link or anything else that is counted comes first. Raises OSError."""
    data = storage.read_bytes(path, start, stop - start)
    window = Window(lambda offset, size: data[offset - start : offset - start + size], 0, 0, 0)
    listing = _Listing(path)
    try:
        member = next(_walk(window, listing, start), None)
    except DamagedTarError:
        return None
    return None if listing.links or listing.account.skipped() else member


def _describe_damage(window: Window, listing: _Listing, error: DamagedTarError) -> str:
    if isinstance(error, _TrailingBytesError):
        size = storage.size(listing.path) - error.position
        return f"the {size:,} bytes after its end, from byte {error.position:,}, are no tar"
    if not listing.count and window.get(257, 5) != b"ustar":
        head = window.get(0, HEAD_BYTES)
        what = describe(head) if head else "an empty file"
        if what:
            return f"not a tar, but {what}"
    return f"broken after {listing.count} members ({error}); what follows is lost"


def _walk(window: Window, listing: _Listing, position: int = 0) -> Iterator[TarMember]:
    """The regular files of a tar whose headers begin at `position`. Links, and what is not used, go into `listing`.

    A member is a header of one block and its data in whole blocks; before it there may be extension headers, each with
    records as its data, such as a name too long for the header. Blocks of zeros end the tar; another may follow.
    """
    records: dict[bytes, bytes] = {}  # of extension headers, for the next member
    records_of_all: dict[bytes, bytes] = {}  # and for all members that follow
    while True:
        header = window.get(position, BLOCK)
        if header == _ZEROS:
            following = _next_tar(window, listing, position)
            if following is None:
                return
            position, records, records_of_all = following, {}, {}
            continue
        if not is_header(header):
            raise DamagedTarError if header else DamagedTarError("no end mark: it was cut short")
        kind, size, data = header[156:157], number_in(header[124:136]), position + BLOCK
        if kind in EXTENSIONS:
            extended = records_of_all if kind == PAX_OF_ALL else records
            extended.update(_read_extension(window, kind, data, size))
            position = end_of_data(data, size)
            continue

        name = records.get(b"path") or records_of_all.get(b"path") or name_in(header)
        sparse = kind == SPARSE
        if records:
            size, sparse = _by_records(records, size, sparse)
        if kind == b"\0" and name.endswith(b"/"):  # a folder, from before there was a letter for those
            kind = b"5"
        if kind in WITHOUT_DATA:
            size = 0
        elif kind == SPARSE and header[482]:
            data = _after_sparse_map(window, data)
        position = end_of_data(data, size)

        if kind in FILES and not sparse:
            listing.count += 1
            yield TarMember(decode_name(name), data, size)
        else:
            target = records.get(b"linkpath") or records_of_all.get(b"linkpath") or until_nul(header[157:257])
            listing.note_other(kind, decode_name(name), decode_name(target), data, sparse)
        records = {}


def _by_records(records: dict[bytes, bytes], size: int, sparse: bool) -> tuple[int, bool]:
    """The size of a member, and whether it is sparse, by the records before its header."""
    if b"size" in records:
        size = number_in(records[b"size"], 10)
    return size, sparse or any(key.startswith(b"GNU.sparse.") for key in records)


def _next_tar(window: Window, listing: _Listing, position: int) -> int | None:
    """Where another tar begins after the zeros at `position`; None where nothing follows them, and a file of nothing
    but zeros is counted as an empty tar. Raises _TrailingBytesError for something else."""
    began = position
    while data := window.get(position, _ZEROS_READ):
        if rest := data.lstrip(b"\0"):
            start = position + (len(data) - len(rest)) // BLOCK * BLOCK
            if not is_header(window.get(start, BLOCK)):
                raise _TrailingBytesError(start)
            return start
        position += len(data)
    if began == 0:
        listing.account.skip("empty tars", listing.path)
    return None


def _read_extension(window: Window, kind: bytes, data: int, size: int) -> dict[bytes, bytes]:
    """The records of an extension header; GNU's long names as pax would call them."""
    if size > _MOST_EXTENSION or len(content := window.get(data, size)) < size:
        raise DamagedTarError
    if kind == LONG_NAME:
        return {b"path": until_nul(content)}
    if kind == LONG_TARGET:
        return {b"linkpath": until_nul(content)}
    return pax_records(content)


def _why_not_used(kind: bytes, sparse: bool) -> str:
    if sparse:
        return "sparse files in tars, which are not laid out as they read (write them without --sparse)"
    if kind in DEVICES:
        return "devices and pipes in tars"
    return f"members of tars of the unknown type {chr(kind[0])!r}"


def _linked_files(window: Window, listing: _Listing) -> Iterator[TarMember]:
    """The files that the links of a tar lead to, under the links' names. Links that lead to none are counted."""
    links = {_path_in_tar(link.name): link for link in listing.links}
    wanted = {_target_path(link) for link in listing.links}
    files: dict[str, list[TarMember]] = {}
    with suppress(DamagedTarError):  # which was reported
        for member in _walk(window, _Listing(listing.path)):
            if (path := _path_in_tar(member.name)) in wanted:
                files.setdefault(path, []).append(member)
    for link in listing.links:
        if file := _resolve(link, links, files):
            yield file._replace(name=link.name)
        else:
            listing.account.skip(
                "links in tars to what is no file in the same tar (tar --dereference writes the files themselves)",
                f"{listing.path}: {link.name} -> {link.target}",
            )


def _resolve(link: _Link, links: dict[str, _Link], files: dict[str, list[TarMember]]) -> TarMember | None:
    """The file that a link leads to, through other links if need be. If several files have its name, a hard link means
    the last of them before the link, if there is one, as when they are extracted."""
    for _ in range(_MOST_LINKS):
        target = _target_path(link)
        if candidates := files.get(target):
            before = (file for file in reversed(candidates) if not link.hard or file.offset < link.position)
            return next(before, candidates[-1])
        if target not in links:
            return None
        link = links[target]
    return None


def _path_in_tar(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _target_path(link: _Link) -> str:
    """The path in the tar that a link names: from the root of the tar, or, for a symbolic link, from its own folder."""
    if link.hard:
        return _path_in_tar(link.target)
    return posixpath.normpath(posixpath.join(posixpath.dirname(_path_in_tar(link.name)), link.target))


def _after_sparse_map(window: Window, position: int) -> int:
    """Where the data of one of GNU's sparse files begins, after the blocks that say where its pieces go."""
    while len(block := window.get(position, BLOCK)) == BLOCK:
        position += BLOCK
        if not block[504]:
            return position
    raise DamagedTarError
