"""A CLIP model's evaluation preprocessing: open_clip's own geometry, on uint8, up to normalisation.

The device that runs the model normalises whole batches: that moves a quarter of the bytes, and needs no floating-point
work per image. Shapes: B images, H height, W width.
"""

from __future__ import annotations

import PIL
import torch
from open_clip.constants import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from cache_schemas import Preprocessing
from dimefm.images.decode import decode_fast, decode_pillow, to_tensor
from dimefm.images.open_clip_steps import require_drawable, resize_and_crop, shorter_side

NORMS = {
    "OpenAI's": (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    "Inception's (0.5)": (INCEPTION_MEAN, INCEPTION_STD),
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
}
"""The means and standard deviations of channels that models are trained with, by whose they are."""
_PILLOW = int(PIL.__version__.partition(".")[0])


class Preprocess:
    """Encoded bytes to a uint8 tensor (3, H, W) of the model's input size. Raises DecodeError. Safe in threads.

    A JPEG is decoded to a tensor and resized here, which agrees with Pillow to within 2 of 255. All else, and with
    `exact` JPEGs too, goes through open_clip's own steps as a Pillow image (images/open_clip_steps.py).
    """

    def __init__(self, facts: Preprocessing, *, exact: bool = False) -> None:
        self.facts = facts
        self._exact = exact
        height, width = facts.size
        self.resizes_tensors = facts.resize_mode == "squash" or (facts.resize_mode == "shortest" and height == width)

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.apply(self.decode(data))

    def decode(self, data: bytes) -> torch.Tensor | Image.Image:
        """The image at its own size, as `apply` takes it. Raises DecodeError."""
        return decode_pillow(data) if self._exact else decode_fast(data)

    def apply(self, image: torch.Tensor | Image.Image) -> torch.Tensor:
        """The input of the model from an image that `decode` gave. Raises DecodeError."""
        height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else (image.height, image.width)
        require_drawable(height, width, self.facts)
        if isinstance(image, torch.Tensor):
            if self.resizes_tensors:
                return self._resize_and_crop(image)
            return to_tensor(resize_and_crop(to_pil_image(image), self.facts))
        return to_tensor(resize_and_crop(image, self.facts))

    def _resize_and_crop(self, image_3HW: torch.Tensor) -> torch.Tensor:
        height, width = self.facts.size
        if self.facts.resize_mode == "squash":
            return resize(image_3HW, (height, width), interpolation_mode(self.facts))
        resized_3HW = resize(image_3HW, shortest_side(image_3HW, height), interpolation_mode(self.facts))
        top, left = (round((side - height) / 2) for side in resized_3HW.shape[-2:])  # as torchvision's CenterCrop
        return resized_3HW[:, top : top + height, left : left + width]


def interpolation_mode(facts: Preprocessing) -> str:
    """torch's name of the interpolation: open_clip's evaluation uses bicubic for anything but bilinear."""
    return "bilinear" if facts.interpolation == "bilinear" else "bicubic"


def shortest_side(image_3HW: torch.Tensor, side: int) -> tuple[int, int]:
    """`open_clip_steps.shorter_side` of an image (3, H, W)."""
    height, width = image_3HW.shape[-2:]
    return shorter_side(height, width, side)


def resize(
    image_3HW: torch.Tensor, size: tuple[int, int], mode: str = "bicubic", *, pillow: int | None = None
) -> torch.Tensor:
    """Antialiased resize of a uint8 image, one axis after the other, rounding to uint8 in between.

    Pillow does the same, and in Pillow's order of the axes the result is within 2 of 255 of Pillow's. In the other
    order, or without the rounding, the overshoot of the first pass is clipped in other places, and sharp edges differ
    by up to 30. On a CPU, one call of torch's resize does the width first. `pillow` is the release, such as 13, whose
    order it is; by default the installed one.
    """
    height, width = size
    image = image_3HW[None]
    by_pillow = mode == "bicubic" and (_PILLOW if pillow is None else pillow) >= 13
    if by_pillow and _height_first(image.shape[-2] - height, image.shape[-1] - width):
        image = _interpolate(image, (height, image.shape[-1]), mode)
    elif image.device.type != "cpu":
        image = _interpolate(image, (image.shape[-2], width), mode)
    return _interpolate(image, size, mode)[0]


def _interpolate(image_13HW: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """torch's antialiased interpolation; on a GPU by way of float, since only the CPU has kernels for uint8."""
    if image_13HW.shape[-2:] == size:
        return image_13HW
    if image_13HW.device.type == "cpu":
        return interpolate(image_13HW, size, mode=mode, antialias=True)
    found = interpolate(image_13HW.float(), size, mode=mode, antialias=True)
    return found.round_().clamp_(0, 255).to(torch.uint8)


def _height_first(fewer_rows: int, fewer_columns: int) -> bool:
    """Whether Pillow resizes the height first: from 13.0 on, where that removes far more pixels than the width does.
    The order shows only where a pass overshoots, as bicubic does."""
    return fewer_rows > max(0, 2 * fewer_columns)


def normalise(pixels_B3HW: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, 3, H, W) to float32: (pixels / 255 - mean) / std by channel, on the device of `pixels`.

    On a CPU this is two steps in place, which take a third of the time of one step that makes another tensor. On a GPU
    it is one kernel, and the CPU does not wait for it.
    """
    scale = _by_channel([1 / (255 * s) for s in std], pixels_B3HW.device)
    shift = _by_channel([-m / s for m, s in zip(mean, std, strict=True)], pixels_B3HW.device)
    if pixels_B3HW.is_cuda:
        return torch.addcmul(shift, pixels_B3HW, scale)
    return pixels_B3HW.float().mul_(scale).add_(shift)


def _by_channel(values: list[float], device: torch.device) -> torch.Tensor:
    """float32 (1, C, 1, 1), filled on the device: a copy from the CPU's memory would wait for the device's queue."""
    return torch.stack([torch.full((), value, device=device) for value in values]).view(1, -1, 1, 1)
