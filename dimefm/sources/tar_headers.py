"""The headers of a tar: blocks of 512 bytes that say what a member is called, of what kind it is and how long."""

from __future__ import annotations

from zlib import adler32

BLOCK = 512

# The kind of a member is one byte of its header.
FILES = {b"0", b"\0", b"7"}  # 7 was for contiguous files, and is laid out as any other
HARD_LINK, SYMBOLIC_LINK = b"1", b"2"
DEVICES = {b"3", b"4", b"6"}
FOLDERS = {b"5", b"D", b"V"}  # and GNU's listing of one, and the label of an archive
WITHOUT_DATA = {HARD_LINK, SYMBOLIC_LINK, *DEVICES, b"5"}  # whatever their size field says, nothing follows
SPARSE = b"S"
LONG_NAME, LONG_TARGET, PAX_OF_ALL = b"L", b"K", b"g"
EXTENSIONS = {LONG_NAME, LONG_TARGET, b"x", b"X", PAX_OF_ALL}  # x and X: pax records of the next member

_ADLER = 65521


class DamagedTarError(Exception):
    """What stands where a header should be cannot be one."""

    def __init__(self, why: str = "a damaged header") -> None:
        super().__init__(why)


def is_header(block: bytes) -> bool:
    """Whether a block is whole and has the checksum of a header."""
    if len(block) < BLOCK:
        return False
    try:
        written = number_in(block[148:156])
    except DamagedTarError:
        return False
    # Adler-32 begins with 1 plus the sum of the bytes, modulo a prime: at a twentieth of the cost of sum().
    total = adler32(block[156:], adler32(block[:148])) & 0xFFFF
    return not (total + 8 * 32 - 1 - written) % _ADLER or written == _signed_sum(block)


def _signed_sum(header: bytes) -> int:
    """The checksum as some tars of old made it, of bytes with a sign."""
    field = header[:148] + b" " * 8 + header[156:]
    return sum(field) - 256 * sum(byte > 127 for byte in field)


def number_in(field: bytes, base: int = 8) -> int:
    """A number in a header: octal digits with spaces and NULs around them, or GNU's base 256 after a first \\x80."""
    try:
        number = int(field.rstrip(b"\0 "), base)
    except ValueError:
        digits = field.partition(b"\0")[0].strip()
        if field[:1] == b"\x80":
            number = int.from_bytes(field[1:], "big")
        elif digits:
            raise DamagedTarError from None
        else:
            number = 0
    if not 0 <= number < 1 << 62:
        raise DamagedTarError
    return number


def name_in(header: bytes) -> bytes:
    """The name of a member, unless an extension header gives another."""
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs, and keeps times in this place
        return until_nul(header[345:500]) + b"/" + name
    return name


def until_nul(field: bytes) -> bytes:
    """A text in a header: its bytes before the first NUL."""
    return field.partition(b"\0")[0]


def decode_name(name: bytes) -> str:
    """A name as str; a byte that is not UTF-8 becomes \\xNN."""
    return name.decode("utf-8", "backslashreplace")


def end_of_data(data: int, size: int) -> int:
    """Where the next header is: data are filled up to whole blocks."""
    return data + (size + BLOCK - 1 & -BLOCK)


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, each b"LENGTH KEY=VALUE\\n" where LENGTH counts all of it."""
    records = {}
    place = 0
    while place < len(content) and content[place]:
        digits, space, _ = content[place : place + 20].partition(b" ")
        end = place + int(digits) if digits.isdigit() else 0
        key, equals, value = content[place + len(digits) + 1 : end - 1].partition(b"=")
        if not space or not equals or not key or content[end - 1 : end] != b"\n":
            raise DamagedTarError
        records[key] = value.rstrip(b"/") if key == b"path" else value
        place = end
    return records
