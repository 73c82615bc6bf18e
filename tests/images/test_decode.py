"""Decoding: odd images give the right pixels, broken ones their status and a reason."""

from __future__ import annotations

import ast
import base64
import io
import struct
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_schemas import Status
from dimefm.images.decode import (
    FORMATS,
    MAX_PIXELS,
    DecodeError,
    decode_fast,
    decode_rgb,
    decode_scaled,
    jpeg_size,
    open_image,
    sniff,
)
from dimefm.sources.image_kinds import IMAGE_EXTENSIONS
from tests.making import encoded, make_jpeg, picture


def huge_png(width: int, height: int) -> bytes:
    """A valid grey PNG, all black, made a row at a time."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = bytes(width + 1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def failure(data: bytes) -> tuple[Status, str]:
    with pytest.raises(DecodeError) as caught:
        decode_fast(data)
    return caught.value.status, str(caught.value)


def pixels(data: bytes) -> np.ndarray:
    """(H, W, 3)"""
    tensor = decode_rgb(data)
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


# -- what cannot be decoded -------------------------------------------------------------------------------------------


def test_no_bytes() -> None:
    assert failure(b"") == (Status.EMPTY, "no bytes")


def test_zeros_alone() -> None:
    assert failure(bytes(1000))[0] == Status.UNDECODABLE


def test_a_text_file_named_jpg() -> None:
    status, reason = failure(b"<html><body>404 Not Found</body></html>\n" * 20)
    assert status == Status.UNDECODABLE
    assert reason == "a page of HTML, as servers send in place of a file (fetch it again)"


def test_a_git_lfs_pointer_named_jpg() -> None:
    status, reason = failure(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n")
    assert status == Status.UNDECODABLE
    assert reason.startswith("a Git LFS pointer, not the file itself")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg(share: float) -> None:
    whole = make_jpeg((200, 150))
    status, reason = failure(whole[: int(len(whole) * share)])
    assert status == Status.UNDECODABLE
    assert reason


@pytest.mark.parametrize("fewer", [1, 2, 3, 20])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_without_its_last_bytes_is_truncated(fewer: int, options: dict[str, object]) -> None:
    """Pillow would do without the mark at the end; torchvision's decoder, which was here first, did not."""
    whole = encoded(picture((200, 150)), "JPEG", **options)
    assert failure(whole[:-fewer]) == (Status.UNDECODABLE, "Image is incomplete or truncated")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_of_another_format(kind: str) -> None:
    whole = encoded(picture((200, 150)), kind)
    assert failure(whole[: len(whole) // 2])[0] == Status.UNDECODABLE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("length", [2, 4, 8, 12, 16])
def test_a_signature_without_an_image(kind: str, length: int) -> None:
    status, reason = failure(encoded(picture(), kind)[:length])
    assert status == Status.UNDECODABLE
    assert "\n" not in reason


def test_damaged_bytes_in_the_middle_of_a_png() -> None:
    whole = bytearray(encoded(picture((200, 150)), "PNG"))
    whole[len(whole) // 2 : len(whole) // 2 + 64] = b"\xff" * 64
    assert failure(bytes(whole))[0] == Status.UNDECODABLE


def test_a_huge_image_is_refused_by_its_header_alone() -> None:
    data = huge_png(20_000, 20_000)
    assert len(data) < 4_000_000
    tracemalloc.start()
    began = time.perf_counter()
    status, reason = failure(data)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == Status.TOO_LARGE
    assert "400000000 pixels" in reason.replace(",", "")
    assert seconds < 1
    assert peak < 3 * len(data)


def test_the_limit_counts_pixels() -> None:
    data = encoded(picture((40, 30)), "PNG")
    assert decode_rgb(data, max_pixels=1200).shape == (3, 30, 40)
    with pytest.raises(DecodeError, match=r"40 x 30 is 1,200 pixels; the limit is 1,199") as caught:
        decode_rgb(data, max_pixels=1199)
    assert caught.value.status == Status.TOO_LARGE


def test_an_image_a_little_above_the_limit_is_refused_without_a_warning() -> None:
    side = int(MAX_PIXELS**0.5) + 2
    header = huge_png(side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DecodeError) as caught:
            open_image(header)
    assert caught.value.status == Status.TOO_LARGE


# -- what is not decoded on purpose -----------------------------------------------------------------------------------


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def no_ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Who tried to start it."""
    started: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *words, **options: started.append(words))
    return started


def test_an_eps_under_any_name_starts_no_ghostscript(no_ghostscript: list[object]) -> None:
    assert failure(EPS) == (Status.UNDECODABLE, "EPS is not one of the formats that are decoded")
    wrapped = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS
    assert failure(wrapped)[1] == "EPS is not one of the formats that are decoded"
    assert no_ghostscript == []


@pytest.mark.parametrize("kind", ["SPIDER", "MSP", "ICNS", "DDS"])
def test_a_format_that_photographs_do_not_have_is_refused(kind: str) -> None:
    modes = {"MSP": "1", "SPIDER": "F"}
    image = picture((64, 64)).convert(modes.get(kind, "RGB"))
    assert failure(encoded(image, kind))[0] == Status.UNDECODABLE


def test_every_place_that_opens_an_image_names_its_formats() -> None:
    root = Path(__file__).parents[2]
    for house in ("dimefm", "pipeline", "cache_schemas", "benchmarks"):
        for path in (root / house).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                    assert "formats" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


def test_a_text_that_unpacks_to_gigabytes_costs_no_memory() -> None:
    """In a PNG, where Pillow would keep it beside the image."""
    text = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    good = encoded(picture(), "PNG")
    for place in (33, len(good) - 12):  # before the pixels, and after them
        tracemalloc.start()
        status, reason = failure(good[:place] + chunk + good[place:])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (status, peak < 20_000_000) == (Status.UNDECODABLE, True)
        assert "too large" in reason


# -- what is odd but good ---------------------------------------------------------------------------------------------


def of_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3)"""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 33), (61, 47), (128, 96)])
@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": subsampling, "quality": quality} for subsampling in (0, 1, 2) for quality in (20, 90, 100)),
        *({"progressive": True, "subsampling": subsampling} for subsampling in (0, 2)),
        {"keep_rgb": True},
        {"restart_marker_blocks": 1, "optimize": True},
    ],
    ids=str,
)
def test_a_jpeg_has_the_pixels_that_pillow_gives(size: tuple[int, int], options: dict[str, object]) -> None:
    data = encoded(picture(size), "JPEG", **options)
    assert isinstance(decode_fast(data), torch.Tensor)
    assert np.array_equal(pixels(data), of_pillow(data))


# 12 x 16 pixels whose colour is stored at a quarter of the height, or at a third of the width.
_TABLES = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wCDEAAoABwAHgAjAB4AGQAoACMAIQAjAC0AKwAoADAAPABkAEEAPAA3ADcAPAB7AFgAXQBJAGQAkQCAAJkA"
    "lgCPAIAAjACKAKAAtADmAMMAoACqANoArQCKAIwAyAERAMsA2gDuAPUBAgEEAQIAmwDBARsBLwEYAPoBLADmAP0BAgD4/9sAQwErLS08NTx2QUF2"
    "+KWMpfj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4/8EAEQgAEAAMAwE"
)
RARE = {
    "4:4:1": "UAAIRAQMRAf/EABYAAQEBAAAAAAAAAAAAAAAAAAABBP/EABcQAQEBAQAAAAAAAAAAAAAAAAABAwL/xAAVAQEBAAAAAAAAAAAAAAAAAAA"
    "DBP/EABgRAAMBAQAAAAAAAAAAAAAAAAABAhIR/9oADAMBAAIRAxEAPwDPdk6zgAmn0puhNiZwDaYOj//Z",
    "3 x 1": "xAAIRAQMRAf/EABYAAQEBAAAAAAAAAAAAAAAAAAABBP/EABcQAQEBAQAAAAAAAAAAAAAAAAABAwL/xAAVAQEBAAAAAAAAAAAAAAAAAAA"
    "BA//EABkRAAIDAQAAAAAAAAAAAAAAAAACAREhMf/aAAwDAQACEQMRAD8Az3ZJsFOF3TR1nCZwSSZoGfT/2Q==",
}


@pytest.mark.parametrize("name", RARE)
def test_a_jpeg_of_a_rare_kind_has_the_pixels_that_pillow_gives(name: str) -> None:
    """simplejpeg has no name for the one, and cannot decode the other."""
    data = base64.b64decode(_TABLES + RARE[name])
    assert isinstance(decode_fast(data), torch.Tensor)
    assert np.array_equal(pixels(data), of_pillow(data))
    assert jpeg_size(data) is None
    assert np.array_equal(decode_scaled(data, (16, 12), 1.0).permute(1, 2, 0), of_pillow(data))


def test_a_jpeg_with_damage_or_rubbish_within_is_decoded_all_the_same() -> None:
    whole = encoded(picture((200, 150)), "JPEG", restart_marker_blocks=4)
    scan = whole.index(b"\xff\xda") + 14
    for damaged in (
        whole[:-2] + bytes(40) + whole[-2:],
        whole + b"rubbish \xff\xda",
        whole[: scan + 300] + whole[scan + 310 :],
        whole[: scan + 300] + bytes([whole[scan + 300] ^ 64]) + whole[scan + 301 :],
    ):
        assert np.array_equal(pixels(damaged), of_pillow(damaged))


def test_the_first_picture_of_a_jpeg_with_two_is_read() -> None:
    data = encoded(picture((40, 30)), "MPO", save_all=True, append_images=[picture((40, 30), seed=1)])
    assert np.array_equal(pixels(data), of_pillow(data))


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    found = pixels(encoded(picture().convert("L"), "JPEG"))
    assert found.shape == (32, 48, 3)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])
    assert found.std() > 5


def test_a_progressive_jpeg_is_read() -> None:
    image = picture((64, 64))
    progressive, plain = encoded(image, "JPEG", progressive=True), encoded(image, "JPEG")
    assert np.array_equal(pixels(progressive), pixels(plain))


def test_a_cmyk_jpeg_has_its_colours() -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 40))
    found = pixels(encoded(red.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found.mean(axis=(0, 1)) - (200, 30, 40)).max() < 8


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    found = pixels(encoded(Image.fromarray(ramp), "PNG")).astype(int)
    assert np.abs(found[..., 0] - np.arange(256)).max() <= 1
    assert np.array_equal(found[..., 0], found[..., 2])


def test_sixteen_bit_tiff_of_either_byte_order_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    for mode in ("I;16", "I;16B"):
        values = ramp.astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (256, 4), values.tobytes())
        found = pixels(encoded(image, "TIFF")).astype(int)
        assert np.abs(found[..., 0] - np.arange(256)).max() <= 1


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        assert np.abs(pixels(data).mean(axis=(0, 1)) - (250, 0, 0)).max() < 6


def test_a_palette_png_has_the_colours_of_its_palette() -> None:
    image = picture((30, 20)).quantize(16)
    assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_an_rgba_png_loses_its_alpha_and_keeps_its_colours() -> None:
    image = picture((30, 20))
    with_alpha = image.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize((30, 20)))
    assert np.array_equal(pixels(encoded(with_alpha, "PNG")), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_png_is_read(mode: str) -> None:
    data = encoded(picture((30, 20)).convert(mode), "PNG")
    assert pixels(data).shape == (20, 30, 3)


def test_exif_orientation_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encoded(picture((40, 20)), "JPEG", exif=exif)).shape == (20, 40, 3)


def test_one_pixel_is_an_image() -> None:
    for kind in ("JPEG", "PNG"):
        assert pixels(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), kind)).shape == (1, 1, 3)


def test_threads_decode_the_same_as_one() -> None:
    datas = [make_jpeg((50 + i, 40), seed=i) for i in range(8)] + [b"", make_jpeg()[:100]]
    alone = [_outcome(data) for data in datas]
    found: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: [_outcome(d) for d in datas]})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [alone] * 4


def _outcome(data: bytes) -> str:
    try:
        return str(zlib.crc32(decode_rgb(data).numpy().tobytes()))
    except DecodeError as error:
        return f"{error.status.name}: {error}"


# -- what this installation can decode, by name and by content -------------------------------------------------------


def test_files_whose_extension_is_that_of_an_image_are_of_the_formats_that_are_decoded() -> None:
    Image.init()
    of = {extension[1:]: name for extension, name in Image.registered_extensions().items()}
    others = {"avif", "heic", "heif", "jp2", "j2k", "jpx", "qoi", "webp"}  # of what Pillow may lack here
    assert {of[extension] for extension in IMAGE_EXTENSIONS - others} <= {*FORMATS}
    assert {of[extension] for extension in others & of.keys()} <= {*FORMATS}
    assert not IMAGE_EXTENSIONS & {"eps", "ps", "wmf", "psd", "pdf", "h5", "svg", "txt", ""}


SNIFFED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "ICO", "PCX", "SGI")


@pytest.mark.parametrize("kind", SNIFFED)
def test_a_format_is_known_by_its_first_bytes(kind: str) -> None:
    data = encoded(picture((40, 30)), kind)
    assert sniff(data[:32]) == kind == Image.open(io.BytesIO(data)).format
    assert sniff(b"x" + data[:31]) is None


def test_the_family_of_heif_is_told_apart_by_its_brands() -> None:
    def box(major: bytes, *others: bytes) -> bytes:
        body = b"ftyp" + major + bytes(4) + b"".join(others)
        return (struct.pack(">I", len(body) + 4) + body + bytes(64))[:32]

    assert sniff(box(b"avif", b"mif1")) == sniff(box(b"mif1", b"miaf", b"avif")) == "AVIF"
    assert sniff(box(b"heic", b"mif1")) == sniff(box(b"mif1", b"heic")) == "HEIF"
    assert sniff(box(b"isom", b"mp42")) is None
    assert sniff(box(b"mif1", b"xavi", b"fxxx")) == "HEIF"


def test_what_is_no_image_is_not_sniffed() -> None:
    for head in (
        b"",
        b"P5 is a player",
        b"BMW and others, a long line of text",
        b"II. The second",
        b"\xff\xd8",
        bytes(32),
    ):
        assert sniff(head) is None
