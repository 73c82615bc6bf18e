"""Side files, which list the members of the tar beside them with their offsets, so that its headers need not be read.

Two kinds are published: X.idx as DALI's wds2idx writes it (v1.2: extension, offset, size and name of each member, a
sample per line), and X.json as hfutils and webshart write it (filesize, and by name the offset and size of a file).
A side file may belong to another version of its tar. It is used only if its members fill the tar from end to end, which
an added, removed or resized file would break, and if some of the headers agree with it. If it leaves out a link, a
device or a sparse file, the tar is read by its headers, which tell what that is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.tar import TarMember, first_member_between
from dimefm.sources.tar_headers import BLOCK, end_of_data
from dimefm.sources.walk_folder import files_in
from dimefm.system import storage

_SUFFIXES = (".idx", ".json")
_MOST_BYTES = 256 << 20
_MOST_HEADER = 1 << 16  # bytes before a member: its header, and extension headers with what does not fit into that
_MOST_TAIL = 20 * BLOCK + 2 * BLOCK  # bytes of the end mark, and of what fills up a record of GNU tar
_CHECKS = 6  # headers that are compared, beside those of an unusual size
_MOST_ODD = 64  # headers of an unusual size
_NUMBER = re.compile(r"[0-9]{1,18}")
_FIRST_LINE = re.compile(r"(v\d+\.\d+) (\d{1,18})")


class _UnfitError(Exception):
    """A side file does not fit its tar; the message says why."""


def find_side_files(tars: Sequence[SourceFile]) -> dict[str, SourceFile]:
    """The file beside each tar that may be its side file, by the tar's path; folders are listed to find them."""
    candidates: dict[str, SourceFile] = {}
    for folder in {tar.path.rpartition("/")[0] for tar in tars}:
        try:
            listed = files_in(folder, lambda name: name.endswith(_SUFFIXES), Account())
        except SourceError:  # files may be read where listing them is not allowed
            continue
        candidates |= {file.path: file for file in listed if 0 < file.size < _MOST_BYTES}
    found = {}
    for tar in tars:
        names = (tar.path.removesuffix(".tar") + suffix for suffix in _SUFFIXES)
        if name := next((name for name in names if name in candidates), None):
            found[tar.path] = candidates[name]
    return found


def read_side_file(tar: SourceFile, side: SourceFile, account: Account) -> list[TarMember] | None:
    """The regular files of a tar, in order, by its side file. None where `side` is no side file, or where it does not
    fit the tar, which is reported. Raises SourceError where the storage does not answer or refuses."""
    try:
        data = storage.read_bytes(side.path)
        members = _parse_idx(data) if side.path.endswith(".idx") else _parse_json(data, tar.size)
        if members is None:
            return None
        members.sort(key=lambda member: member.offset)
        _require_fit(tar, members)
    except _UnfitError as unfit:
        account.problem(f"{side.path} does not fit its tar and is not used: {unfit}")
        return None
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "run the same command again once the storage answers, or take the side file away"
        raise SourceError(f"{side.path} or its tar cannot be read: {error}", remedy=remedy) from error
    return members


def _parse_idx(data: bytes) -> list[TarMember] | None:
    """The members that an .idx lists; None where it is another kind of file."""
    try:
        first, *lines = data.decode().splitlines()
    except ValueError:
        return None
    version = _FIRST_LINE.fullmatch(first)
    if not version:
        return None
    if version[1] != "v1.2":
        raise _UnfitError(f"it is of version {version[1]}, without names")
    if len(lines) != int(version[2]):
        raise _UnfitError("it is cut short")
    members = []
    for line in lines:
        words = line.split(" ")
        for at in range(0, len(words), 4):
            match words[at : at + 4]:
                # A name with spaces, or with letters that tar shows as \303\251, cannot be read back.
                case extension, offset, size, name if name.endswith(extension) and "\\" not in name:
                    members.append(_member(name, offset, size))
                case _:
                    raise _UnfitError(f"a line cannot be read: {line[:80]!r}")
    return members


def _parse_json(data: bytes, tar_size: int) -> list[TarMember] | None:
    """The members that a .json lists; None where it is another kind of file."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict) or "filesize" not in document:
        return None
    if document["filesize"] != tar_size:
        raise _UnfitError(f"it belongs to a tar of {document['filesize']} bytes, and this has {tar_size}")
    members = []
    for name, entry in document["files"].items():
        if not isinstance(entry, dict):
            raise _UnfitError(f"an entry cannot be read: {name[:80]!r}")
        members.append(_member(name, entry.get("offset"), entry.get("size", entry.get("length"))))
    return members


def _member(name: str, offset: object, size: object) -> TarMember:
    if not (_NUMBER.fullmatch(str(offset)) and _NUMBER.fullmatch(str(size)) and name.isprintable()):
        raise _UnfitError(f"an entry cannot be read: {name[:80]!r}")
    return TarMember(name, int(str(offset)), int(str(size)))


def _require_fit(tar: SourceFile, members: list[TarMember]) -> None:
    """Raises _UnfitError unless the members, sorted by offset, are all that the tar holds, as far as their offsets and
    some of its headers show."""
    if not members:
        raise _UnfitError("it names no file")
    ends = [0, *(end_of_data(member.offset, member.size) for member in members)]
    header_sizes = [member.offset - end for member, end in zip(members, ends, strict=False)]
    tail = tar.size - ends[-1]
    if any(size < BLOCK or size % BLOCK or size > _MOST_HEADER for size in header_sizes):
        raise _UnfitError("its members overlap, or leave room for others")
    if not 2 * BLOCK <= tail <= _MOST_TAIL:
        raise _UnfitError(f"its last member ends {tail} bytes before the tar does")
    usual = Counter(header_sizes).most_common(1)[0][0]
    odd = [at for at, size in enumerate(header_sizes) if size != usual]
    if len(odd) > _MOST_ODD:
        raise _UnfitError("its members leave room for others")
    step = max(1, len(members) // _CHECKS)
    for at in sorted({*odd, *range(0, len(members), step), len(members) - 1}):
        if first_member_between(tar.path, ends[at], members[at].offset) != members[at]:
            raise _UnfitError(f"{members[at].name!r} is not where it says")
    if any(storage.read_bytes(tar.path, ends[-1], tail)):
        raise _UnfitError("something follows its last member")
