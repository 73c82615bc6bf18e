"""The operations of strong views: to the last bit what they were when views were first cached, and close to Pillow."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cache_schemas import StrongViews, ViewPlan
from cache_schemas.views import FIXED, MOST_VIEWS, ONE, OPERATIONS_VERSION, Operation
from dimefm.images import operations
from dimefm.images.crops import draw_mixup, draw_view, level

HEIGHT, WIDTH = 37, 53
_DEGREES = round(FIXED * math.sin(math.radians(27)))
_GREY = (128, 128, 128)

LEVELS: dict[Operation, tuple[int, ...]] = {
    Operation.NONE: (0,),
    Operation.AUTOCONTRAST: (0,),
    Operation.EQUALIZE: (0,),
    Operation.INVERT: (0,),
    Operation.POSTERIZE: (1, 4, 8),
    Operation.SOLARIZE: (0, 26, 256),
    Operation.SOLARIZE_ADD: (0, 99),
    Operation.COLOR: (0, 49, 463),
    Operation.CONTRAST: (0, 49, 463),
    Operation.BRIGHTNESS: (0, 49, 463),
    Operation.SHARPNESS: (0, 49, 463),
    Operation.ROTATE: (-_DEGREES, _DEGREES, FIXED),
    Operation.SHEAR_X: (-17695, 17695),
    Operation.SHEAR_Y: (-17695, 17695),
    Operation.TRANSLATE_X: (-26542, 26542, 2 * FIXED),
    Operation.TRANSLATE_Y: (-26542, 26542, 2 * FIXED),
}
GOLDEN = {
    "NONE": "2b44f0c43ea85b88",
    "AUTOCONTRAST": "811b4cf45652554c",
    "EQUALIZE": "86aff5d50284dd34",
    "INVERT": "a8b123b6e75b2877",
    "POSTERIZE": "4b6fd487ee74a174",
    "SOLARIZE": "fbf8545c4a560944",
    "SOLARIZE_ADD": "4e7e9f863f9b0e5f",
    "COLOR": "a36b9e74bda4d249",
    "CONTRAST": "7454905539c3c3d3",
    "BRIGHTNESS": "23a568b31841758e",
    "SHARPNESS": "b0223250bcf690dd",
    "ROTATE": "c273c13bdfc55686",
    "SHEAR_X": "377cb82e623c0ba6",
    "SHEAR_Y": "bb6fd0f5e34c1761",
    "TRANSLATE_X": "c101f16a57757f4f",
    "TRANSLATE_Y": "5b90c054e6483e32",
    "jitter": "27940be6e8309414",
    "mix": "c8c4c69ed22a9ac8",
}


def pattern(height: int = HEIGHT, width: int = WIDTH) -> operations.Pixels:
    """An image of integers alone, whatever any library does: uint8 (3, H, W), no channel of which is all of 0..255."""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    channels = [(7 * x + 13 * y + x * y // 5) % 199 + 20, (3 * x * x + y * y) % 157 + 3, (x + 2 * y) % 97 + 100]
    return np.stack(channels).astype(np.uint8)


def digest(image_3HW: operations.Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(image_3HW).tobytes()).hexdigest()[:16]


def results() -> dict[str, str]:
    """A digest by operation, of what it gives at all its levels."""
    image, found = pattern(), {}
    for operation, levels in LEVELS.items():
        made = np.concatenate([operations.apply(image, operation, one) for one in levels])
        found[operation.name] = digest(made)
    found["jitter"] = digest(operations.jitter(image, 300, 200, 350))
    found["mix"] = digest(operations.mix(image, image[:, ::-1], 100))
    return found


@pytest.mark.parametrize("name", [*(operation.name for operation in Operation), "jitter", "mix"])
def test_an_operation_gives_the_same_pixels_as_ever(name: str) -> None:
    """A failure here means that cached views would be replayed otherwise than the teacher saw them. A definition is
    never changed: add a version (cache_schemas.views)."""
    assert OPERATIONS_VERSION == 1
    assert results()[name] == GOLDEN[name]


def test_no_operation_changes_the_image_that_it_is_given() -> None:
    image = pattern()
    for operation, levels in LEVELS.items():
        for one in levels:
            found = operations.apply(image, operation, one)
            assert (found.dtype, found.shape) == (np.uint8, image.shape)
            np.testing.assert_array_equal(image, pattern())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (1, 9), (9, 1)])
def test_an_operation_takes_an_image_of_any_size(height: int, width: int) -> None:
    for operation, levels in LEVELS.items():
        assert operations.apply(pattern(height, width), operation, levels[0]).shape == (3, height, width)


# -- against Pillow ---------------------------------------------------------------------------------------------------


def in_pillow(operation: Operation, degree: int, image: Image.Image) -> Image.Image:
    factor, share = degree / ONE, degree / FIXED
    across, down = (image.width - 1) / 2 + 0.5, (image.height - 1) / 2 + 0.5
    warped: dict[Operation, Any] = {
        Operation.SHEAR_X: (1, share, -share * down, 0, 1, 0),
        Operation.SHEAR_Y: (1, 0, 0, share, 1, -share * across),
        Operation.TRANSLATE_X: (1, 0, -round(share * image.width), 0, 1, 0),
        Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, -round(share * image.height)),
    }
    if operation in warped:
        data = warped[operation]
        return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=_GREY)
    if operation is Operation.SOLARIZE_ADD:
        return image.point([min(255, value + degree) if value < 128 else value for value in range(256)] * 3)
    enhance = {
        Operation.COLOR: ImageEnhance.Color,
        Operation.CONTRAST: ImageEnhance.Contrast,
        Operation.BRIGHTNESS: ImageEnhance.Brightness,
        Operation.SHARPNESS: ImageEnhance.Sharpness,
    }
    if operation in enhance:
        return enhance[operation](image).enhance(factor)
    if operation is Operation.ROTATE:
        angle = math.degrees(math.asin(share))
        return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_GREY)
    plain: dict[Operation, Any] = {
        Operation.NONE: lambda: image,
        Operation.AUTOCONTRAST: lambda: ImageOps.autocontrast(image),
        Operation.EQUALIZE: lambda: ImageOps.equalize(image),
        Operation.INVERT: lambda: ImageOps.invert(image),
        Operation.POSTERIZE: lambda: ImageOps.posterize(image, degree),
        Operation.SOLARIZE: lambda: ImageOps.solarize(image, degree),
    }
    found: Image.Image = plain[operation]()
    return found


@pytest.mark.parametrize("operation", list(Operation))
def test_an_operation_is_that_of_pillow(operation: Operation) -> None:
    """To within rounding; where pixels are moved, all but a few at the edge."""
    smooth = np.asarray(Image.fromarray(pattern(14, 11).transpose(1, 2, 0)).resize((111, 97), Image.Resampling.BICUBIC))
    for degree in LEVELS[operation]:
        mine = operations.apply(smooth.transpose(2, 0, 1), operation, degree).astype(int)
        theirs = np.asarray(in_pillow(operation, degree, Image.fromarray(smooth))).transpose(2, 0, 1).astype(int)
        assert np.quantile(np.abs(mine - theirs), 0.97) <= 2, degree
        assert np.abs(mine - theirs).mean() < 1.5, degree


def test_mixing_is_the_weighted_mean() -> None:
    image, other = pattern(), pattern()[::-1]
    for share in (0, 1, 100, 255, 256):
        mixed = operations.mix(image, other, share)
        exact = (image.astype(float) * share + other.astype(float) * (ONE - share)) / ONE
        assert np.abs(mixed - exact).max() <= 0.5
    np.testing.assert_array_equal(operations.mix(image, other, ONE), image)


# -- what is drawn ----------------------------------------------------------------------------------------------------

STRONG = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True, strong=StrongViews())


def test_the_levels_grow_with_the_magnitude() -> None:
    for operation in Operation:
        if operation in (Operation.POSTERIZE, Operation.SOLARIZE):
            assert level(operation, 0, 1) > level(operation, 0.5, 1) > level(operation, 1, 1) >= 0
        elif len(LEVELS[operation]) > 1:
            assert level(operation, 0, 1) < level(operation, 0.5, 1) < level(operation, 1, 1)
        if operation >= Operation.COLOR:  # these go both ways
            ends = [level(operation, 1, sign) - level(operation, 0, 1) for sign in (-1, 1)]
            assert ends[0] == -ends[1] != 0
    assert level(Operation.ROTATE, 1, 1) == FIXED // 2  # 30 degrees


def test_every_operation_is_drawn_about_as_often_and_half_of_the_time_none() -> None:
    drawn = np.stack([draw_view(STRONG, row, 0, 60, 80) for row in range(1500)])
    counts = np.bincount(drawn[:, [5, 7]].ravel(), minlength=len(Operation)) / 3000
    assert counts[0] == pytest.approx(0.5, abs=0.04)
    np.testing.assert_allclose(counts[1:], 0.5 / 15, atol=0.015)
    jitter = drawn[:, 9:] / ONE
    assert jitter.min() == pytest.approx(0.6, abs=0.01)
    assert jitter.max() == pytest.approx(1.4, abs=0.01)


def test_a_strong_view_has_the_crop_of_the_same_view_without_more() -> None:
    crop = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
    for row in range(20):
        np.testing.assert_array_equal(draw_view(STRONG, row, 1, 60, 80)[:5], draw_view(crop, row, 1, 60, 80))


def test_another_row_of_the_shard_is_mixed_in_by_shares_of_a_beta_distribution() -> None:
    plan = ViewPlan(count=9, seed=0, crop_scale=(0.4, 1.0), flip=True, mixup=0.5)
    drawn = [draw_mixup(plan, row, view, 32, 64) for row in range(32, 64) for view in range(9)]
    mixed = [(row, share) for row, share in drawn if row >= 0]
    assert {row for row, _ in mixed} <= set(range(32, 64))
    assert len({row for row, _ in mixed}) > 25
    assert all(share < ONE for _, share in mixed)
    assert all(share >= ONE // 2 for _, share in drawn)
    away = [share / ONE - 0.5 for _, share in drawn]
    assert np.mean(np.square(away)) == pytest.approx(1 / 8, abs=0.015)  # the variance of Beta(1/2, 1/2)
    for row in range(32, 64):
        others = [draw_mixup(plan, row, view, 32, 64)[0] for view in range(4)]
        assert row not in others
        assert len(set(others) - {-1}) <= 1  # which so is decoded once for them
    assert draw_mixup(plan, 5, 0, 5, 6) == (-1, ONE)


# -- the format -------------------------------------------------------------------------------------------------------


def test_views_say_what_is_wrong_with_them() -> None:
    strong = StrongViews(operations=99, magnitude=11, jitter=1.0, version=2)
    plan = ViewPlan(count=0, seed=0, crop_scale=(0.4, 1.0), flip=True, strong=strong, mixup=-1.0, first=-1)
    paths = {problem.path for problem in plan.problems()}
    names = {"strong.operations", "strong.magnitude", "strong.jitter", "strong.version"}
    assert paths == {"count", "mixup", "first", *names}
    most = ViewPlan(count=MOST_VIEWS, seed=0, crop_scale=(0.4, 1.0), flip=True)
    assert not most.problems()
    for plan in (replace(most, count=MOST_VIEWS + 1), replace(most, first=1)):  # a view takes 150 kB at 224 px
        assert [problem.path for problem in plan.problems()] == ["count"]
