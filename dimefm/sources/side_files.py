"""Side files, which say what is in the tar beside them and where, so that it need not be read for that.

Two kinds that are found in public: X.idx as DALI's wds2idx writes it (v1.2: extension, offset, size and name of each
member, a line a sample), and X.json as hfutils and webshart do (filesize, and by name the offset and size of a file).
A side file may be of another version of its tar. It is used only if its members fill the tar from end to end, which an
added, removed or resized file would break, and if the headers at some of its places say the same. The tar of one that
leaves out a link, a device or a sparse file is read by its headers, which know what that is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.tar import BLOCK, TarMember, first_member_between
from dimefm.sources.walk_folder import files_in
from dimefm.system import storage

_SUFFIXES = (".idx", ".json")
_MOST_BYTES = 256 << 20
_MOST_HEADER = 1 << 16  # bytes before a member: its header, and names and records that are too long for it
_MOST_TAIL = 20 * BLOCK + 2 * BLOCK  # the end mark, and what fills up a record of GNU tar's
_CHECKS = 6  # headers that are looked at, beside those that stand out
_MOST_CHECKS = 64
_NUMBER = re.compile(r"[0-9]{1,18}")
_FIRST_LINE = re.compile(r"(v\d+\.\d+) (\d{1,18})")


class _UnfitError(Exception):
    """Why a side file is not used."""


def find_side_files(tars: Sequence[SourceFile]) -> dict[str, SourceFile]:
    """By path of the tar, the file beside it that may be its side file: by the listings of their folders."""
    beside: dict[str, SourceFile] = {}
    for folder in {tar.path.rpartition("/")[0] for tar in tars}:
        try:
            found = files_in(folder, lambda name: name.endswith(_SUFFIXES), Account())
        except SourceError:  # files may be read where listing them is not allowed
            continue
        beside |= {file.path: file for file in found if 0 < file.size < _MOST_BYTES}
    stems = {tar.path: tar.path.removesuffix(".tar") for tar in tars}
    names = {path: [stem + suffix for suffix in _SUFFIXES if stem + suffix in beside] for path, stem in stems.items()}
    return {path: beside[found[0]] for path, found in names.items() if found}


def read_side_file(tar: SourceFile, side: SourceFile, account: Account) -> list[TarMember] | None:
    """The regular files of a tar, in order, by its side file; None where the file is none, or does not fit, which is
    reported. Raises SourceError where the storage does not answer, or refuses."""
    try:
        data = storage.read_bytes(side.path)
        members = _from_lines(data) if side.path.endswith(".idx") else _from_json(data, tar.size)
        if members is None:
            return None
        members.sort(key=lambda member: member.offset)
        _check(tar, members)
    except _UnfitError as unfit:
        account.problem(f"{side.path} does not fit its tar and is not used: {unfit}")
        return None
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "run the same command again once the storage answers, or take the side file away"
        raise SourceError(f"{side.path} or its tar cannot be read: {error}", remedy=remedy) from error
    return members


def _from_lines(data: bytes) -> list[TarMember] | None:
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
                # Spaces in a name cannot be told from those around it, nor can letters that tar shows as \303\251.
                case extension, offset, size, name if name.endswith(extension) and "\\" not in name:
                    members.append(_member(name, offset, size))
                case _:
                    raise _UnfitError(f"a line cannot be read: {line[:80]!r}")
    return members


def _from_json(data: bytes, tar_size: int) -> list[TarMember] | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict) or "filesize" not in document:
        return None
    if document["filesize"] != tar_size:
        raise _UnfitError(f"it is of one of {document['filesize']} bytes, and this has {tar_size}")
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


def _check(tar: SourceFile, members: list[TarMember]) -> None:
    """Raises _UnfitError unless the members, in order of place, are what the tar holds as far as that can be told by
    their places and some of its headers."""
    if not members:
        raise _UnfitError("it names no file")
    ends = [0, *(member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK for member in members)]
    headers = [member.offset - end for member, end in zip(members, ends, strict=False)]
    tail = tar.size - ends[-1]
    if any(size < BLOCK or size % BLOCK or size > _MOST_HEADER for size in headers):
        raise _UnfitError("its members overlap, or leave room for others")
    if not 2 * BLOCK <= tail <= _MOST_TAIL:
        raise _UnfitError(f"its last member ends {tail} bytes before the tar does")
    usual = Counter(headers).most_common(1)[0][0]
    odd = [at for at, size in enumerate(headers) if size != usual]
    if len(odd) > _MOST_CHECKS:
        raise _UnfitError("its members leave room for others")
    step = max(1, len(members) // _CHECKS)
    for at in sorted({*odd, *range(0, len(members), step), len(members) - 1}):
        if first_member_between(tar.path, ends[at], members[at].offset) != members[at]:
            raise _UnfitError(f"{members[at].name!r} is not where it says")
    if any(storage.read_bytes(tar.path, ends[-1], tail)):
        raise _UnfitError("something follows its last member")
