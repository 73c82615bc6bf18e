"""Views of an image, as facts: how they are drawn, and what the array `view` of a store holds of each.

A row of that array is the numbers of one view, int32, from which it is replayed without drawing anything again:

    BOX          top, left, height, width of the crop in pixels of the decoded image; 1 if it is flipped, else 0
    operations   with strong views: an Operation and its level, as often as StrongViews.operations says
    jitter       with strong views: brightness, contrast and colour, each a factor in 1/256
    mixup        with mixup: the row that is mixed in, -1 for none; the share of the own image in 1/256; then the
                 numbers above of the view of that row, zeros for none

The operations and the jitter are applied in this order to the crop, once it has the size of the model's input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from cache_schemas.document import LATER
from cache_schemas.problems import Problem

Augment = Literal["crop", "strong"]

BOX, JITTER, MIXUP = 5, 3, 2  # numbers of a view
ONE = 256
"""1 of a factor or a share that is stored as an integer."""

FIXED = 65536
"""1 of a sine, a shear or a shift that is stored as an integer."""

MOST_VIEWS = 1024
"""Of an image: all of them are in memory at once."""

OPERATIONS_VERSION = 1
"""What `images.operations` implements. A change of any pixel is another version, which keeps the old one readable."""


class Operation(IntEnum):
    """An operation of RandAugment, and below it what its level is. `images.operations` defines each, pixel for
    pixel."""

    NONE = 0
    """Nothing is done; 0."""
    AUTOCONTRAST = 1
    """0."""
    EQUALIZE = 2
    """0."""
    INVERT = 3
    """0."""
    POSTERIZE = 4
    """Bits of a pixel that stay, 1 to 8."""
    SOLARIZE = 5
    """Pixels from this value on are inverted, 0 to 256."""
    SOLARIZE_ADD = 6
    """What is added to pixels below 128."""
    COLOR = 7
    """Factor in 1/256: 0 is grey, 256 the image."""
    CONTRAST = 8
    """Factor in 1/256: 0 is the mean grey, 256 the image."""
    BRIGHTNESS = 9
    """Factor in 1/256: 0 is black, 256 the image."""
    SHARPNESS = 10
    """Factor in 1/256: 0 is smoothed, 256 the image."""
    ROTATE = 11
    """Sine of the angle in 1/65536; positive turns counterclockwise."""
    SHEAR_X = 12
    """Shift in x per pixel of y, in 1/65536."""
    SHEAR_Y = 13
    """Shift in y per pixel of x, in 1/65536."""
    TRANSLATE_X = 14
    """Shift as a share of the width, in 1/65536."""
    TRANSLATE_Y = 15
    """Shift as a share of the height, in 1/65536."""


@dataclass(frozen=True, kw_only=True)
class StrongViews:
    """What strong views have beside crop and flip: `operations` of RandAugment, each left out half of the time, of
    `magnitude` 0 to 10; then brightness, contrast and colour, each by a factor within `jitter` of 1. `version` is that
    of the definitions of the operations."""

    operations: int = 2
    magnitude: int = 9
    jitter: float = 0.4
    version: int = OPERATIONS_VERSION


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """`count` views per image: random resized crops over `crop_scale` of the area, half of them flipped where `flip`,
    each drawn from (seed, row, view). `strong`: what more is done to them. `mixup`: views are mixed with those of other
    rows of the shard, by shares of Beta(mixup, mixup), the larger share their own. `first`: the number of the first
    view, where the store was made to add views to another."""

    count: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool
    strong: StrongViews | None = field(default=None, metadata=LATER)
    mixup: float = field(default=0.0, metadata=LATER)
    first: int = field(default=0, metadata=LATER)

    @property
    def augment(self) -> Augment:
        """What --augment was."""
        return "strong" if self.strong else "crop"

    @property
    def end(self) -> int:
        """The number after that of the last view."""
        return self.first + self.count

    @property
    def alone(self) -> int:
        """How many numbers a view of one image has, before mixup."""
        return BOX + (2 * self.strong.operations + JITTER if self.strong else 0)

    @property
    def numbers(self) -> int:
        """How many numbers the array `view` holds of each view."""
        return 2 * self.alone + MIXUP if self.mixup else self.alone

    def problems(self) -> list[Problem]:
        """What types cannot express, with paths within the plan."""
        found = []
        if not (self.count >= 1 and self.end <= MOST_VIEWS):
            found.append(Problem("count", f"must be 1 to {MOST_VIEWS}, with the views before it, found {self.count}"))
        if self.first < 0:
            found.append(Problem("first", f"must be at least 0, found {self.first}"))
        if not 0 <= self.mixup < float("inf"):
            found.append(Problem("mixup", f"must be 0 or more, found {self.mixup}"))
        if (strong := self.strong) is None:
            return found
        if strong.version != OPERATIONS_VERSION:
            what = f"{strong.version} is not known here; this release knows {OPERATIONS_VERSION}"
            found.append(Problem("strong.version", f"{what}. Install the release that wrote it"))
        if not 0 <= strong.operations <= 16:
            found.append(Problem("strong.operations", f"must be 0 to 16, found {strong.operations}"))
        if not 0 <= strong.magnitude <= 10:
            found.append(Problem("strong.magnitude", f"must be 0 to 10, found {strong.magnitude}"))
        if not 0 <= strong.jitter < 1:
            found.append(Problem("strong.jitter", f"must be from 0 to below 1, found {strong.jitter}"))
        return found
