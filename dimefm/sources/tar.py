"""The members of a tar, by its headers alone.

The standard library's tarfile takes nine times as long a member, and plans have 40 million of them. This reads what
tar, GNU tar and Python write: v7, ustar, GNU and pax headers. Nothing is ever extracted, so a member's name is only a
name, whatever it holds.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import adler32

from dimefm.sources.account import Account
from dimefm.sources.forward_reader import Window, open_window
from dimefm.sources.walk_folder import cannot_read
from dimefm.system import storage
from dimefm.system.first_bytes import HEAD_BYTES, describe

BLOCK = 512
_ZEROS = bytes(BLOCK)
_EXTENSIONS = b"LKxXg"
_FILE = 48  # "0"
_REGULAR = b"0\x007"  # 7 was for contiguous files, and is laid out as any other
_HARD_LINK, _LINKS, _DEVICES = b"1", b"12", b"346"
_FOLDERS = b"5DV"  # and GNU's listing of one, and the label of an archive
_NO_DATA = b"123456"  # links, devices, folders, pipes: whatever their size field says, nothing follows
_MOST_LINKS = 40  # that lead to one another, as in Linux
_ZEROS_READ = 1 << 16  # bytes that are looked through at a time for what follows the end mark
_MOST_EXTENSION = 1 << 22  # bytes of a long name or of pax records; more than that is damage
_ADLER = 65521


class TarMember(NamedTuple):
    """A regular file in a tar: the bytes [offset, offset + size) of it. Bytes of a name that are not UTF-8 read
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


class _Damaged(Exception):
    """A header that is none."""


class _Followed(_Damaged):
    """What follows an end mark, at this place, is no tar."""

    def __init__(self, position: int) -> None:
        self.position = position
        super().__init__()


def tar_members(path: str, account: Account) -> Iterator[TarMember]:
    """Regular files in a tar, in order, and after them those that links stand for, if they are in the same tar.

    Tars one after the other in a file are read as one. Other links, devices and sparse files are counted in `account`.
    What follows a broken header is lost, which is a problem there, as are bytes after the end that are no tar. Raises
    SourceError where it cannot be read.

    Small members are read through in large blocks, and large ones (64 KB, at a URL 1 MB) are leapt over. A tar with
    links is gone through twice.
    """
    listing = _Listing(path, account)
    try:
        with open_window(path) as window:
            try:
                yield from _walk(window, listing)
            except _Followed as error:
                size = storage.size(path) - error.position
                account.problem(f"{path}: the {size:,} bytes after its end, from byte {error.position:,}, are no tar")
            except _Damaged as error:
                what = "" if listing.count or window.get(257, 5) == b"ustar" else _instead(window.get(0, HEAD_BYTES))
                broken = f"broken after {listing.count} members ({error}); what follows is lost"
                account.problem(f"{path}: {f'not a tar, but {what}' if what else broken}")
            if listing.links:
                yield from _linked(window, listing)
    except OSError as error:
        raise cannot_read(path, error) from error


def _instead(head: bytes) -> str | None:
    return describe(head) if head else "an empty file"


def first_member_between(path: str, start: int, stop: int) -> TarMember | None:
    """The first regular file whose header, and what belongs to it, begins at `start` of a tar and ends by `stop`; None
    for the end mark, or where it follows a link or anything else that is counted. Raises OSError."""
    data = storage.read_bytes(path, start, stop - start)
    window = Window(lambda offset, size: data[offset - start : offset - start + size], 0, 0, 0)
    listing = _Listing(path)
    try:
        member = next(_walk(window, listing, start), None)
    except _Damaged:
        return None
    return None if listing.links or listing.account.skipped() else member


def _linked(window: Window, listing: _Listing) -> Iterator[TarMember]:
    """The links of a tar as the files that they lead to. Those that lead to none are counted."""
    links = {_place(link.name): link for link in listing.links}
    wanted = {_target(link) for link in listing.links}
    found: dict[str, list[TarMember]] = {}
    with suppress(_Damaged):  # which was reported
        for member in _walk(window, _Listing(listing.path)):
            if (place := _place(member.name)) in wanted:
                found.setdefault(place, []).append(member)
    for link in listing.links:
        if file := _followed(link, links, found):
            yield file._replace(name=link.name)
        else:
            listing.account.skip(
                "links in tars to what is no file in the same tar (tar --dereference writes the files themselves)",
                f"{listing.path}: {link.name} -> {link.target}",
            )


def _followed(link: _Link, links: dict[str, _Link], found: dict[str, list[TarMember]]) -> TarMember | None:
    """What a link leads to, through others if need be. Of several files of one name a hard link means the last that
    comes before it, if one does, as when they are extracted."""
    for _ in range(_MOST_LINKS):
        target = _target(link)
        if files := found.get(target):
            before = (file for file in reversed(files) if not link.hard or file.offset < link.position)
            return next(before, files[-1])
        if target not in links:
            return None
        link = links[target]
    return None


def _place(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _target(link: _Link) -> str:
    """The place that a link names: from the root of the tar, or, for a symbolic link, from its own folder."""
    if link.hard:
        return _place(link.target)
    return posixpath.normpath(posixpath.join(posixpath.dirname(_place(link.name)), link.target))


def _walk(window: Window, listing: _Listing, position: int = 0) -> Iterator[TarMember]:
    records: dict[bytes, bytes] = {}  # what extension headers say of the member that comes next
    everywhere: dict[bytes, bytes] = {}  # and of all that come
    while True:
        header = window.get(position, BLOCK)
        if len(header) < BLOCK:
            raise _Damaged("a damaged header" if header else "no end mark: it was cut short")
        kind = header[156]
        if not header[0] and header == _ZEROS:
            following = _after_zeros(window, position)
            if following is None:
                if position == 0:
                    listing.account.skip("empty tars", listing.path)
                return
            if len(header := window.get(following, BLOCK)) < BLOCK or not _is_header(header):
                raise _Followed(following)
            position, records, everywhere = following, {}, {}
            continue
        if not _is_header(header):
            raise _Damaged("a damaged header")
        size = _number(header[124:136])
        data = position + BLOCK
        if kind in _EXTENSIONS:
            if size > _MOST_EXTENSION or len(content := window.get(data, size)) < size:
                raise _Damaged("a damaged header")
            if kind in b"LK":
                records[b"path" if kind in b"L" else b"linkpath"] = content.partition(b"\0")[0]
            elif kind in b"xX":
                records.update(_pax(content))
            elif kind in b"g":
                everywhere.update(_pax(content))
            position = data + (size + 511 & -512)
            continue
        name = header[:100].partition(b"\0")[0]
        if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs, and keeps times in this place
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        sparse, target = False, b""
        if records or everywhere:
            name = records.get(b"path") or everywhere.get(b"path") or name
            target = records.get(b"linkpath") or everywhere.get(b"linkpath") or b""
            size = _number(records[b"size"], 10) if b"size" in records else size
            sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            records = {}
        if kind != _FILE:
            if kind in _NO_DATA:
                size = 0
            elif kind == 0 and name.endswith(b"/"):  # a folder, from before there was a letter for those
                kind, size = _FOLDERS[0], 0
            elif kind in b"S":
                sparse, data = True, _after_map(window, data) if header[482] else data
        position = data + (size + 511 & -512)
        if kind in _REGULAR and not sparse:
            listing.count += 1
            yield TarMember(name.decode("utf-8", "backslashreplace"), data, size)
        elif kind in _LINKS:
            target = target or header[157:257].partition(b"\0")[0]
            listing.links.append(_Link(_text(name), _text(target), kind in _HARD_LINK, data))
        elif kind not in _FOLDERS:
            listing.account.skip(_reason(kind, sparse), f"{listing.path}: {_text(name)}")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _reason(kind: int, sparse: bool) -> str:
    if sparse:
        return "sparse files in tars, which are not laid out as they read (write them without --sparse)"
    if kind in _DEVICES:
        return "devices and pipes in tars"
    return f"members of tars of the unknown type {chr(kind)!r}"


def _is_header(block: bytes) -> bool:
    """Whether a block has the checksum of a header."""
    try:
        written = _number(block[148:156])
    except _Damaged:
        return False
    # Adler-32 begins with 1 plus the sum of the bytes, modulo a prime: at a twentieth of the cost of sum().
    total = adler32(block[156:], adler32(block[:148])) & 0xFFFF
    return not (total + 8 * 32 - 1 - written) % _ADLER or written == _signed_sum(block)


def _after_zeros(window: Window, position: int) -> int | None:
    """The first block that is not all zeros, None where none follows."""
    while data := window.get(position, _ZEROS_READ):
        if rest := data.lstrip(b"\0"):
            return position + (len(data) - len(rest)) // BLOCK * BLOCK
        position += len(data)
    return None


def _after_map(window: Window, position: int) -> int:
    """Where the data of one of GNU's sparse files begins, after the blocks that say where its pieces go."""
    while len(block := window.get(position, BLOCK)) == BLOCK:
        position += BLOCK
        if not block[504]:
            return position
    raise _Damaged("a damaged header")


def _number(field: bytes, base: int = 8) -> int:
    """A number of a header: octal digits with spaces and NULs around them, or GNU's base 256 after a first \\x80."""
    try:
        number = int(field.rstrip(b"\0 "), base)
    except ValueError:
        digits = field.partition(b"\0")[0].strip()
        if field[:1] == b"\x80":
            number = int.from_bytes(field[1:], "big")
        elif digits:
            raise _Damaged("a damaged header") from None
        else:
            number = 0
    if not 0 <= number < 1 << 62:
        raise _Damaged("a damaged header")
    return number


def _signed_sum(header: bytes) -> int:
    """The checksum as some tars of old made it, of bytes with a sign."""
    field = header[:148] + b" " * 8 + header[156:]
    return sum(field) - 256 * sum(byte > 127 for byte in field)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, each b"LENGTH KEY=VALUE\\n" where LENGTH counts all of it."""
    records = {}
    place = 0
    while place < len(content) and content[place]:
        digits, space, _ = content[place : place + 20].partition(b" ")
        end = place + int(digits) if digits.isdigit() else 0
        key, equals, value = content[place + len(digits) + 1 : end - 1].partition(b"=")
        if not space or not equals or not key or content[end - 1 : end] != b"\n":
            raise _Damaged("a damaged header")
        records[key] = value.rstrip(b"/") if key == b"path" else value
        place = end
    return records
