"""Every mode that a format can give: the right pixels, or a failure with a reason; never a wrong picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import OPEN_INFO

from cache_schemas import Preprocessing, Status
from dimefm.caching.gpu_image_loader import GpuPreprocess
from dimefm.images.decode import DecodeError, _formats, decode_fast, decode_pillow, decode_rgb
from dimefm.images.image_modes import eight_bit
from dimefm.images.preprocess import Preprocess
from tests.making import encoded, picture


def extensions() -> set[str]:
    """Those of what this installation decodes."""
    return {extension[1:] for extension, name in Image.registered_extensions().items() if name in _formats()}


GREY, COLOUR, PALETTE, CMYK = 1, 2, 3, 5  # photometric interpretations of TIFF
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # its sample formats


def tiff(
    values: np.ndarray[Any, Any],
    photometric: int = GREY,
    *,
    bits: int = 0,
    packed: bool = False,
    **tags: tuple[int, ...],
) -> bytes:
    """A TIFF of (H, W) or (H, W, C) values in their own byte order; `tags` by number, t338=(1,) say."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, channels = (*values.shape, 1)[:3]
    kind = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}[values.dtype.kind]
    data = values.tobytes()
    data = zlib.compress(data) if packed else data
    bits = bits or values.dtype.itemsize * 8
    entries = {
        256: (width,), 257: (height,), 258: (bits,) * channels, 259: (8 if packed else 1,), 262: (photometric,),
        273: (8,), 277: (channels,), 278: (height,), 279: (len(data),), 339: (kind,) * channels,
    }  # fmt: skip
    entries |= {int(name[1:]): value for name, value in tags.items()}
    at, extra, table = 8 + len(data), b"", struct.pack(order + "H", len(entries))
    after = at + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        form, size = ("I", 4) if max(numbers) > 65535 or tag == 279 else ("H", 2)
        packed_numbers = struct.pack(f"{order}{len(numbers)}{form}", *numbers)
        if len(packed_numbers) > 4:
            extra, packed_numbers = extra + packed_numbers, struct.pack(order + "I", after + len(extra))
        table += struct.pack(order + "HHI", tag, 4 if size == 4 else 3, len(numbers)) + packed_numbers.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", at) + data + table + bytes(4) + extra


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    """int (H, W, 3), which both decoders and the fallback of the GPU's agree on."""
    found = decode_rgb(data).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(decode_pillow(data).convert("RGB")))
    return found.astype(int)


def reason(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_fast(data)
    assert caught.value.status == Status.UNDECODABLE
    return str(caught.value)


RAMP = np.arange(256).reshape(8, 32)  # every level from black to white


# -- numbers that are no levels of 0 to 255 -----------------------------------------------------------------------


@pytest.mark.parametrize(("order", "packed"), [("<", False), ("<", True), (">", False)])
def test_floats_from_0_to_1_and_from_0_to_255_are_read(order: str, packed: bool) -> None:
    for values in (RAMP / 255, RAMP.astype(float)):
        found = pixels(tiff(values.astype(order + "f4"), packed=packed))
        assert np.array_equal(found[..., 0], RAMP)
        assert np.array_equal(found[..., 1], found[..., 2])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.where(RAMP == 7, np.nan, RAMP / 255), "1 of its 256 values are NaN"),
        (np.where(RAMP == 7, np.inf, RAMP / 255), "1 of its 256 values are NaN or infinite"),
        (RAMP / 200, "from 0 to 1.275, and nothing says which is white"),  # a filter that has overshot
        (RAMP / 255 - 0.01, "from -0.01 to 0.99"),
        (RAMP + 200.0, "from 200 to 455"),  # kelvin
        (RAMP * 257.0, "from 0 to 65535"),
    ],
)
def test_floats_whose_white_is_not_known_are_refused(values: np.ndarray[Any, Any], said: str) -> None:
    assert said in reason(tiff(values.astype("<f4")))


def test_numbers_that_pillow_misreads_are_refused() -> None:
    """It turns the bytes around that libtiff has turned around already."""
    for values in ((RAMP / 255).astype(">f4"), RAMP.astype(">i4"), RAMP.astype(">i2")):
        assert "Pillow misreads" in reason(tiff(values, packed=True))


@pytest.mark.parametrize("kind", ["<u4", "<i4", ">i4", "<i2", ">i2"])
def test_wide_and_signed_integers_are_read_where_they_are_levels(kind: str) -> None:
    assert np.array_equal(pixels(tiff(RAMP.astype(kind)))[..., 0], RAMP)
    assert np.array_equal(pixels(tiff((RAMP > 99).astype(kind)))[..., 0], (RAMP > 99) * 255)  # a mask
    for values in (RAMP * 100, RAMP * 100 - 1000, RAMP // 64):
        assert "nothing says which is white" in reason(tiff(values.astype(kind)))


def test_an_integer_above_65535_is_refused() -> None:
    assert "nothing says which is white" in reason(tiff((RAMP * 257 + 9).astype("<u4")))
    assert "nothing says which is white" in reason(tiff(RAMP.astype("<u4") << 24))


def test_a_float_map_is_read_by_the_same_rule() -> None:
    header = b"Pf\n32 8\n-1.0\n"
    upwards = (RAMP / 255).astype("<f4")[::-1]  # its rows begin at the bottom
    assert np.array_equal(pixels(header + upwards.tobytes())[..., 0], RAMP)
    assert "nothing says" in reason(header + (upwards * 5).tobytes())


# -- 16 and 12 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
def test_16_bits_are_their_high_byte(order: str, packed: bool) -> None:
    wide = (RAMP * 256 + 200).astype(order + "u2")
    assert np.array_equal(pixels(tiff(wide, packed=packed))[..., 0], RAMP)
    colour = np.stack([wide, wide[::-1], wide[:, ::-1]], -1)
    assert np.array_equal(pixels(tiff(colour, COLOUR, packed=packed)), colour >> 8)


def test_white_may_be_zero() -> None:
    for values in (RAMP.astype("u1"), (RAMP * 257).astype("<u2"), (RAMP / 255).astype("<f4")):
        assert np.array_equal(pixels(tiff(values, photometric=0))[..., 0], 255 - RAMP)


def test_12_bits_are_not_taken_for_16() -> None:
    """Two values in three bytes."""
    first, second = (RAMP.ravel() * 16 + 5).reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype("u1")
    data = tiff(packed.reshape(8, 48), bits=12, t256=(32,))
    assert np.array_equal(pixels(data)[..., 0], RAMP)


def test_16_bits_of_other_formats() -> None:
    wide = (RAMP * 256 + 200).astype("<u2")
    grey = Image.fromarray(wide)
    assert np.array_equal(pixels(encoded(grey, "PNG"))[..., 0], RAMP)
    assert np.array_equal(pixels(b"P5 32 8 65535\n" + wide.astype(">u2").tobytes())[..., 0], RAMP)
    colour = pixels(b"P6 32 8 65535\n" + np.stack([wide] * 3, -1).astype(">u2").tobytes())
    assert np.abs(colour[..., 0] - RAMP).max() <= 1
    assert np.abs(pixels(b"P5 32 8 4095\n" + (RAMP * 4095 // 255).astype(">u2").tobytes())[..., 0] - RAMP).max() <= 1
    if "jp2" in extensions():
        assert np.array_equal(pixels(encoded(grey, "JPEG2000"))[..., 0], RAMP)


def test_a_png_with_16_bits_of_colour() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    wide = np.stack([RAMP * 256 + 200, RAMP[::-1] * 257, RAMP * 0], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 32, 8, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(pixels(data), wide >> 8)


# -- colour spaces, palettes and alpha --------------------------------------------------------------------------------


def facts() -> Preprocessing:
    return Preprocessing(
        size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest"
    )


def palette_with_alpha() -> tuple[bytes, np.ndarray[Any, Any]]:
    """A TIFF in mode PA, and its colours. What lies between two numbers of its palette is another colour."""
    image = picture((48, 32)).quantize(32)
    colours = np.zeros((3, 256), int)
    table = np.array(image.getpalette()).reshape(-1, 3)
    colours[:, : len(table)] = table.T
    values = np.stack([np.asarray(image), np.full((32, 48), 255, "u1")], -1).astype("u1")
    data = tiff(values, PALETTE, t338=(2,), t320=tuple((colours * 257).ravel().tolist()))
    return data, np.asarray(image.convert("RGB"))


def test_the_numbers_of_a_palette_are_not_interpolated() -> None:
    data, colours = palette_with_alpha()
    assert Image.open(io.BytesIO(data)).mode == "PA"
    assert np.array_equal(pixels(data), colours)
    wanted = Preprocess(facts())(encoded(Image.fromarray(colours), "PNG"))
    for exact in (False, True):
        assert (Preprocess(facts(), exact=exact)(data).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_grey_with_alpha_of_either_kind(alpha: int) -> None:
    """1 is multiplied into the grey already; Pillow cannot make RGB of that, which ended the job."""
    data = tiff(np.stack([RAMP, RAMP * 0 + 255], -1).astype("u1"), t338=(alpha,))
    assert np.array_equal(pixels(data)[..., 0], RAMP)
    for exact in (False, True):
        assert Preprocess(facts(), exact=exact)(data).float().std() > 20


MAKERS: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encoded(picture().convert("CMYK"), "TIFF"),
    "YCbCr": lambda: encoded(picture().convert("YCbCr"), "TIFF"),
    "LAB": lambda: encoded(picture().convert("LAB"), "TIFF"),
    "RGBA": lambda: encoded(picture().convert("RGBA"), "PNG"),
    "RGBa": lambda: tiff(np.asarray(picture().convert("RGBA")), COLOUR, t338=(1,)),
    "palette with transparency": lambda: encoded(picture().quantize(16), "PNG", transparency=bytes(range(16))),
    "16 bits CMYK": lambda: tiff(np.asarray(picture().convert("CMYK")).astype("<u2") * 257, CMYK),
}


@pytest.mark.parametrize("name", MAKERS)
def test_colour_is_right_in_every_space(name: str) -> None:
    wanted = np.asarray(picture().quantize(16).convert("RGB") if "palette" in name else picture()).astype(int)
    data = MAKERS[name]()
    assert np.abs(pixels(data) - wanted).mean() < 2
    on_gpu: Any = object.__new__(GpuPreprocess)  # what it does without nvJPEG
    on_gpu._on_cpu, on_gpu._device, on_gpu._decode = Preprocess(facts()), "cpu", None
    (found,) = on_gpu([data])
    assert np.array_equal(found, Preprocess(facts())(data))


def test_every_mode_that_pillow_can_read_from_a_tiff_becomes_rgb() -> None:
    for mode in {mode for mode, _ in OPEN_INFO.values()}:
        image = Image.new("LA" if mode == "La" else mode, (9, 7))
        image = image.convert("La") if mode == "La" else image
        image.format = "TIFF"
        small = eight_bit(image).resize((4, 4), Image.Resampling.BICUBIC)
        assert small.convert("RGB").mode == "RGB", mode


# -- what needs something that is not here ---------------------------------------------------------------------------


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(64)


@pytest.mark.skipif("heic" in extensions(), reason="pillow-heif is installed")
def test_heif_without_its_decoder_says_what_to_install() -> None:
    assert reason(HEIC) == "HEIF needs pip install pillow-heif"


@pytest.mark.skipif("heic" not in extensions(), reason="pillow-heif is not installed")
def test_heif_is_read_where_its_decoder_is() -> None:
    assert np.abs(pixels(encoded(picture((64, 48)), "HEIF", quality=95)) - np.asarray(picture((64, 48)))).mean() < 8


@pytest.mark.parametrize(("kind", "extension"), [("AVIF", "avif"), ("JPEG2000", "jp2")])
def test_newer_formats(kind: str, extension: str) -> None:
    if extension not in extensions():
        pytest.skip(f"Pillow without {kind}")
    assert np.abs(pixels(encoded(picture((64, 48)), kind)) - np.asarray(picture((64, 48)))).mean() < 3


def test_a_tiff_of_an_unknown_kind_is_named() -> None:
    colour = np.stack([RAMP / 255] * 3, -1).astype("<f4")
    assert reason(tiff(colour, COLOUR)).startswith("it begins as TIFF does, but is damaged, or of a kind")
