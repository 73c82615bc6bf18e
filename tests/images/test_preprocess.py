"""Preprocessing gives the pixels that open_clip's own gives, and embeddings that are the same.

The reference in every test is open_clip.transform.image_transform_v2 on the image as Pillow opens it.
"""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms.functional import center_crop

from cache_schemas import Preprocessing, Status
from dimefm.images.decode import DecodeError
from dimefm.images.open_clip_steps import input_pixels
from dimefm.images.preprocess import Preprocess, normalise, resize, shortest_side
from dimefm.models.clip import Clip
from tests.making import encoded, make_jpeg, picture, read_tar

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LARGER, SMALLER, WIDE, TALL, EXTREME, EXACT = (301, 217), (40, 33), (300, 61), (37, 211), (900, 11), (64, 64)
SIZES = pytest.mark.parametrize("size", [LARGER, SMALLER, WIDE, TALL, EXTREME, EXACT, (65, 64), (64, 63), (1, 1)])


def facts(
    resize_mode: str = "shortest", interpolation: str = "bicubic", size: tuple[int, int] = (64, 64)
) -> Preprocessing:
    return Preprocessing(
        size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode, fill_color=7
    )


def of_open_clip(data: bytes, wanted: Preprocessing) -> np.ndarray:
    """What open_clip's transform gives, brought back to 0..255: float (3, H, W)."""
    transform = image_transform_v2(PreprocessCfg(**asdict(wanted)), is_train=False)
    normal_3HW = transform(Image.open(io.BytesIO(data)))
    std, mean = (torch.tensor(values)[:, None, None] for values in (wanted.std, wanted.mean))
    return ((normal_3HW * std + mean) * 255).numpy()


def difference(data: bytes, wanted: Preprocessing) -> float:
    ours, theirs = Preprocess(wanted)(data), of_open_clip(data, wanted)
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape == (3, *wanted.size)
    return float(np.abs(ours.numpy() - theirs).max())


@SIZES
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_a_jpeg_agrees_with_open_clip(size: tuple[int, int], interpolation: str, resize_mode: str) -> None:
    assert difference(make_jpeg(size, seed=3), facts(resize_mode, interpolation)) <= 2.01


@SIZES
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_a_png_is_exactly_as_open_clip_has_it(size: tuple[int, int], resize_mode: str) -> None:
    assert difference(encoded(picture(size, seed=4), "PNG"), facts(resize_mode)) < 0.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("kind", ["JPEG", "P", "1", "LA", "RGBA"])
def test_without_torch_the_pixels_are_exactly_those_of_open_clip(
    kind: str, resize_mode: str, interpolation: str
) -> None:
    for size in ((91, 60), SMALLER, (37, 5), (25, 24), (1, 1)):
        image = picture(size, seed=5)
        data = encoded(image, "JPEG") if kind == "JPEG" else encoded(image.convert(kind), "PNG")
        for shape in ((24, 24), (18, 32), (31, 17)):
            wanted = facts(resize_mode, interpolation, shape)
            pixels_3HW = input_pixels(data, wanted)
            assert (pixels_3HW == of_open_clip(data, wanted).round()).all(), (size, shape)
            assert (Preprocess(wanted, exact=True)(data).numpy() == pixels_3HW).all()


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_an_input_that_is_not_square_agrees_with_open_clip(resize_mode: str) -> None:
    for data in (make_jpeg(LARGER), make_jpeg(SMALLER), encoded(picture(LARGER), "PNG")):
        assert difference(data, facts(resize_mode, size=(48, 80))) <= 2.01


@pytest.mark.parametrize("size", [(24, 24), (16, 24), (70, 290), (290, 70), (60, 80), (80, 60), (130, 180), (180, 130)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_sharp_edges_agree_with_open_clip(size: tuple[int, int], resize_mode: str) -> None:
    """Bicubic overshoots most here: with both axes at once, or in the other order, it is up to 30 of 255 away."""
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3)) * 255
    data = encoded(Image.fromarray(noise.astype(np.uint8), "RGB"), "JPEG", quality=100, subsampling=0)
    assert difference(data, facts(resize_mode)) <= 2.01


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_agree_with_open_clip(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert difference(encoded(picture(LARGER).convert(mode), kind), facts()) < 0.01


def test_a_grey_jpeg_and_a_cmyk_jpeg_agree_with_open_clip() -> None:
    for mode in ("L", "CMYK"):
        assert difference(encoded(picture(LARGER).convert(mode), "JPEG"), facts()) <= 2.01


def test_the_longer_side_is_cropped_in_the_middle_and_filled_with_the_fill_colour() -> None:
    halves = Image.new("RGB", (128, 64), (250, 0, 0))
    halves.paste((0, 0, 250), (64, 0, 128, 64))
    cropped = Preprocess(facts("shortest"))(encoded(halves, "PNG"))
    assert (cropped[0, :, 0] > 200).all()
    assert (cropped[2, :, -1] > 200).all()
    padded = Preprocess(facts("longest"))(encoded(halves, "PNG"))
    assert (padded[:, 0] == 7).all()
    assert (padded[:, -1] == 7).all()


def test_what_cannot_be_decoded_raises() -> None:
    with pytest.raises(DecodeError):
        Preprocess(facts())(b"no image")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 200, (64, 128)), (200, 100, (128, 64)), (3, 1000, (64, 21333)), (64, 64, (64, 64)), (100, 101, (64, 64))],
)
def test_the_shorter_side_is_met_and_the_longer_rounded_down(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    assert shortest_side(torch.empty(3, height, width), 64) == expected


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1)
    assert torch.equal(resize(image, (32, 48)), image)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [LARGER, SMALLER, WIDE, TALL, EXTREME, (64, 91), (91, 64)])
def test_resize_is_one_axis_after_the_other(size: tuple[int, int], mode: str) -> None:
    """In the order of Pillow 13, whether torch is asked for both at once or not."""
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), np.uint8) * 255)
    image = noise.permute(2, 0, 1)
    wanted = shortest_side(image, 64)
    tall = mode == "bicubic" and size[1] - wanted[0] > max(0, 2 * (size[0] - wanted[1]))
    between = (wanted[0], size[0]) if tall else (size[1], wanted[1])
    found = image[None]
    for target in (between, wanted):
        if found.shape[-2:] != target:
            found = torch.nn.functional.interpolate(found, target, mode=mode, antialias=True)
    assert torch.equal(resize(image, wanted, mode), found[0])


@pytest.mark.parametrize("size", [(64, 64), (64, 65), (64, 66), (64, 67), (64, 111), (65, 64), (99, 64), (101, 64)])
def test_the_middle_is_that_of_torchvision(size: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8))
    assert torch.equal(Preprocess(facts()).apply(image), center_crop(image, [64, 64]))


def test_normalise_is_the_formula() -> None:
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert torch.allclose(normalise(pixels, MEAN, STD), (pixels / 255 - mean) / std, atol=1e-5)


def test_embeddings_agree_with_a_plain_open_clip_loop(sample: Path, clip: Clip, teacher_name: str) -> None:
    datas = [
        *read_tar(sample / "images" / "train-00000.tar", 12).values(),
        make_jpeg((500, 340)),
        make_jpeg((30, 90)),
        encoded(picture((333, 250)), "PNG"),
    ]
    model, _, transform = open_clip.create_model_and_transforms(teacher_name)
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(io.BytesIO(data))) for data in datas])
        theirs = torch.nn.functional.normalize(model.eval().encode_image(images), dim=-1)
    preprocess = Preprocess(clip.identity.preprocessing)
    ours = clip.encode_images(torch.stack([preprocess(data) for data in datas]))
    cosine = (ours * theirs).sum(dim=-1)
    assert cosine.min() > 0.9999
    others = (ours @ theirs.T)[~torch.eye(len(datas), dtype=torch.bool)]
    assert others.max() < 0.999


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_strip_that_would_fill_the_memory_is_refused(kind: str) -> None:
    """1 x 60,000 pixels are few, and 224 x 13,440,000 are three gigabytes a channel."""
    strip = encoded(Image.new("RGB", (60_000, 1)), kind)
    with pytest.raises(DecodeError, match="would be 3,010,560,000 pixels when resized") as caught:
        Preprocess(facts(size=(224, 224)))(strip)
    assert caught.value.status == Status.TOO_LARGE


def test_a_strip_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(DecodeError, match="of 60000 x 1 nothing would be left when resized"):
        input_pixels(encoded(Image.new("RGB", (60_000, 1)), "PNG"), facts("longest"))
