"""What a file is by its first bytes, for messages about files that are not what their names say."""

from __future__ import annotations

import re

HEAD_BYTES = 128
"""How many of the first bytes are enough."""

_BEGINNINGS = {
    "a Git LFS pointer, not the file itself (git lfs pull fetches it)": rb"version https://git-lfs\.github\.com/spec/",
    "gzip-compressed (decompress it: gzip -dc)": rb"\x1f\x8b",
    "zstd-compressed (decompress it: zstd -dc)": rb"\x28\xb5\x2f\xfd",
    "bzip2-compressed (decompress it: bzip2 -dc)": rb"BZh[1-9]",
    "xz-compressed (decompress it: xz -dc)": rb"\xfd7zXZ\0",
    "lz4-compressed (decompress it: lz4 -dc)": rb"\x04\x22\x4d\x18",
    "a zip archive (unzip it)": rb"PK\x03\x04",
    "a 7z archive (unpack it)": rb"7z\xbc\xaf\x27\x1c",
    "an SVG drawing, which is not made of pixels": rb"\s*(<\?xml[^>]*>\s*)?<svg\b",
    "a page of HTML, as servers send in place of a file (fetch it again)": rb"\s*<(!doctype html|html|head|body)\b",
    "a document of XML, as object stores send in place of a file (fetch it again)": rb"\s*<(\?xml|error)\b",
    "a Parquet file": rb"PAR1",
    "a PDF": rb"%PDF-",
}
_COMPILED = {what: re.compile(beginning, re.IGNORECASE) for what, beginning in _BEGINNINGS.items()}


def describe(head: bytes) -> str | None:
    """What a file is that begins with `head`, with what to do about it; None where that is not known."""
    return next((what for what, beginning in _COMPILED.items() if beginning.match(head)), None)
