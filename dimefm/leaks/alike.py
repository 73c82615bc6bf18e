"""Whether two pictures are the same one: resized, compressed again, cropped, mirrored, brighter, or with more contrast.

Two grey thumbnails are laid over each other, each in turn cut to many windows of it, and correlated; the best window is
then moved and scaled a little. The correlation is that of their values without mean and spread, so that brightness and
contrast do not count; and of these the lesser of two, with and without what is smooth, as two ships on two seas are
alike but for their detail.

Shapes: W windows of an image, P pixels of a thumbnail.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cache_schemas import Status
from dimefm.images.decode import DecodeError, open_image
from dimefm.images.image_modes import eight_bit

_SIDE, _LARGE = 32, 192  # pixels: of a thumbnail, and of the image that windows are cut from
_SQUARE, _PLACES = (0.9, 0.8, 0.7, 0.6, 0.5), (0.0, 0.25, 0.5, 0.75, 1.0)
_NARROW = (0.75, 0.5625)  # what is left of the longer side where the middle of a 4:3 or a 16:9 was cut out
_HOPELESS = 0.45  # a correlation that no refinement makes a match
_AROUND, _SMOOTH = 3, 1e-3  # pixels on each side that a pixel is compared with; a norm below which there is no detail
_STEPS = (0.06, 0.03, 0.015)  # of an image's side, by which a window is moved and scaled
_Array = np.ndarray[Any, Any]


class Window(NamedTuple):
    """A part of an image: left, top, width and height as shares of its sides."""

    left: float
    top: float
    width: float
    height: float


def _windows() -> list[Window]:
    """The windows that are tried; the whole image first."""
    found = [Window(0, 0, 1, 1)]
    found += [Window((1 - s) * x, (1 - s) * y, s, s) for s, x, y in product(_SQUARE, _PLACES, _PLACES)]
    found += [Window((1 - s) / 2, 0, s, 1) for s in _NARROW] + [Window(0, (1 - s) / 2, 1, s) for s in _NARROW]
    return found


_WINDOWS = _windows()


class Look:
    """An image as it is compared."""

    def __init__(self, data: bytes) -> None:
        """Raises DecodeError for an image that cannot be decoded."""
        image = open_image(data)
        image.draft("L", (2 * _LARGE, 2 * _LARGE))
        try:
            self._grey = eight_bit(image).convert("RGB").convert("L")
        except MemoryError:
            raise
        except Exception as error:  # decoders of many formats, which fail in many ways
            raise DecodeError(Status.UNDECODABLE, str(error).strip().split("\n")[0]) from None
        self._grey.thumbnail((_LARGE, _LARGE), Image.Resampling.BILINEAR)
        self.windows_WP = self.cut(_WINDOWS)
        self.mirrored_P = _normalised(self._values(_WINDOWS[:1])[:, :, ::-1])[0]

    @property
    def whole_P(self) -> _Array:
        """The whole image, float32, of mean 0 and norm 1; zeros where it has one colour, and so is like none."""
        whole: _Array = self.windows_WP[0]
        return whole

    def cut(self, windows: list[Window]) -> _Array:
        """Windows of the image, (W, P), each like `whole_P`."""
        return _normalised(self._values(windows))

    def _values(self, windows: list[Window]) -> _Array:
        (width, height), size = self._grey.size, (_SIDE, _SIDE)
        boxes = [((x * width, y * height, (x + w) * width, (y + h) * height)) for x, y, w, h in windows]
        cut = [self._grey.resize(size, Image.Resampling.BILINEAR, box=box) for box in boxes]
        return np.stack([np.asarray(one, np.float32) for one in cut])


def _normalised(values: _Array) -> _Array:
    flat_WP = values.reshape(len(values), -1)
    flat_WP = flat_WP - flat_WP.mean(axis=1, keepdims=True)
    norm_W1 = np.linalg.norm(flat_WP, axis=1, keepdims=True)
    found: _Array = np.divide(flat_WP, norm_W1, out=np.zeros_like(flat_WP), where=norm_W1 > _SIDE)
    return found


def similarity(one: Look, other: Look) -> float:
    """The correlation of the whole of one image, as it is or mirrored, with that window of the other which is most like
    it: 1 for the same picture, about 0 for two that have nothing in common."""
    ways = [(whole.whole_P, cut) for whole, cut in ((one, other), (other, one))]
    ways += [(whole.mirrored_P, cut) for whole, cut in ((one, other), (other, one))]
    found = []
    for whole_P, cut in ways:
        correlation_W = cut.windows_WP @ whole_P
        best = int(correlation_W.argmax())
        found.append((float(correlation_W[best]), best, whole_P, cut))
    value, best, whole_P, cut = max(found, key=lambda way: way[0])
    if value < _HOPELESS:
        return value
    (cut_P,) = cut.cut([_refined(value, _WINDOWS[best], whole_P, cut)])
    return min(float(cut_P @ whole_P), float(_detail(cut_P) @ _detail(whole_P)))


def _detail(image_P: _Array) -> _Array:
    """A thumbnail without what is smooth: what is left of it beside the mean around each pixel; of norm 1, or 0."""
    sums = np.pad(np.pad(image_P.reshape(_SIDE, _SIDE), _AROUND, mode="edge").cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    size = 2 * _AROUND + 1
    total = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    detail_P = image_P - (total / size**2).reshape(-1)
    detail_P = detail_P - detail_P.mean()
    norm = float(np.linalg.norm(detail_P))
    found: _Array = detail_P / norm if norm > _SMOOTH else np.zeros_like(detail_P)
    return found


def _refined(value: float, window: Window, whole_P: _Array, cut: Look) -> Window:
    """The window after it is moved and scaled, by smaller and smaller steps, as long as that helps."""
    for step in _STEPS:
        for _ in range(4):
            near = _near(window, step)
            correlation_W = cut.cut(near) @ whole_P
            best = int(correlation_W.argmax())
            if correlation_W[best] <= value:
                break
            value, window = float(correlation_W[best]), near[best]
    return window


def _near(window: Window, step: float) -> list[Window]:
    """Windows that are moved, or wider or narrower about their middle, by `step`, within the image."""
    found = []
    for dx, dy, dw, dh in product((-step, 0.0, step), repeat=4):
        if (dw or dh) and (dx or dy):
            continue  # one or the other
        width, height = (min(1.0, max(0.3, side + more)) for side, more in ((window.width, dw), (window.height, dh)))
        left = window.left + dx - (width - window.width) / 2
        top = window.top + dy - (height - window.height) / 2
        found.append(Window(min(max(0.0, left), 1 - width), min(max(0.0, top), 1 - height), width, height))
    return found
