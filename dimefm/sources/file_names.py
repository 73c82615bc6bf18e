"""What the name of a file, or of a member of a tar, says about it, and the reason why one is not used."""

from __future__ import annotations

import re

HIDDEN_MEMBERS = "hidden members of tars"

_EXTENSION = re.compile(r"\.([a-z][a-z0-9]{0,11})$")
_OF_MEMBERS = re.compile(r"[a-z][a-z0-9_]{0,11}(\.[a-z][a-z0-9_]{0,11})?")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.[a-z0-9]{2,4})$")
_REMEDIES = {
    **dict.fromkeys(("zip", "7z", "rar"), " (unpack them)"),
    **dict.fromkeys(("parq", "pq"), " (rename them to .parquet)"),
    **dict.fromkeys(("arrow", "feather"), " (write them as Parquet)"),
    **dict.fromkeys(("gz", "tgz", "bz2", "xz", "zst", "lz4"), " (decompress them)"),
}
_HIDDEN = re.compile(r"(^|/)(\.[^./]|\.\.[^/]|__MACOSX/)")


def extension_of(path: str) -> str:
    """The extension of a file, in lower case and without the dot; empty where it has none, or none that means a kind of
    file, as in `photo.2019` or `a.jpg?w=200`."""
    match = _EXTENSION.search(path.rpartition("/")[2].lower())
    return match[1] if match else ""


def why_not_read(path: str) -> str:
    """The reason for a file whose name is not that of a kind that is read, as Account.skip takes it."""
    if _COMPRESSED.search(path.lower()):
        return "compressed tars, of which no member can be read alone (decompress them)"
    extension = extension_of(path)
    if not extension:
        return "files without an extension, or with none that is known"
    return f"files that end in .{extension}{_REMEDIES.get(extension, '')}"


def why_member_not_read(extension: str) -> str:
    """The reason for a member of a tar, by its extension as base.split_key gives it."""
    if _OF_MEMBERS.fullmatch(extension):
        return f"members of tars that end in .{extension}"
    return "members of tars without an extension, or with none that is known (call them KEY.jpg, KEY.txt, ...)"


def is_hidden_member(name: str, key: str) -> bool:
    """Whether a member of a tar, with this key, is hidden or in a hidden folder, as desktop programs leave them."""
    return not key or ("/" in name and (key[-1] == "/" or _HIDDEN.search(name) is not None))
