"""Whether two pictures are the same one."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

from dimefm.images.decode import DecodeError
from dimefm.leaks.alike import Look, similarity
from tests.making import make_jpeg, read_tar


@pytest.fixture(scope="module")
def photographs(image_tar: Path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB") for data in read_tar(image_tar, 24).values()]


def encoded(image: Image.Image, quality: int = 90, kind: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, quality=quality)
    return sink.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    left, top = 0.6 * (1 - share) * width, 0.3 * (1 - share) * height
    return image.crop((int(left), int(top), int(left + share * width), int(top + share * height)))


COPIES = {
    "compressed": lambda image: encoded(image, 40),
    "a PNG": lambda image: encoded(image, kind="PNG"),
    "smaller": lambda image: encoded(image.resize((max(24, image.width * 2 // 3), max(24, image.height * 2 // 3)))),
    "stretched": lambda image: encoded(image.resize((image.width, image.height * 3 // 4))),
    "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "brighter": lambda image: encoded(ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.3)).enhance(0.8)),
    "grey": lambda image: encoded(image.convert("L")),
    "cropped": lambda image: encoded(cropped(image, 0.75)),
    "cropped and mirrored": lambda image: encoded(
        cropped(image, 0.8).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_alike_whichever_of_the_two_is_first(photographs: list[Image.Image], kind: str) -> None:
    found = []
    for image in photographs:
        one, other = Look(encoded(image)), Look(COPIES[kind](image))
        assert similarity(one, other) == pytest.approx(similarity(other, one), abs=0.15)
        found.append(similarity(one, other))
    assert sum(value >= 0.75 for value in found) >= len(found) - 1


def test_different_pictures_are_not_alike(photographs: list[Image.Image]) -> None:
    looks = [Look(encoded(image)) for image in photographs]
    found = [similarity(one, other) for n, one in enumerate(looks) for other in looks[:n]]
    assert max(found) < 0.75
    assert sum(value > 0.5 for value in found) < len(found) / 100


def test_images_of_one_colour_are_like_none(photographs: list[Image.Image]) -> None:
    blank, white = (Look(encoded(Image.new("RGB", (40, 40), colour))) for colour in ("black", "white"))
    assert similarity(blank, white) == 0
    assert similarity(blank, Look(encoded(photographs[0]))) == 0


def test_smooth_images_need_more_than_the_same_shades() -> None:
    """A gradient from light to dark is like every other one, but for what is in it."""
    plain = Image.linear_gradient("L").convert("RGB")
    one, other = plain.copy(), plain.copy()
    one.paste((255, 255, 255), (40, 40, 90, 90))
    other.paste((0, 0, 0), (130, 150, 190, 220))
    assert similarity(Look(encoded(one)), Look(encoded(other))) < 0.5


def test_what_is_no_image_is_an_error() -> None:
    with pytest.raises(DecodeError):
        Look(b"no image")
    with pytest.raises(DecodeError):
        Look(make_jpeg((64, 64))[:300])
