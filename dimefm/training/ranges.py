"""Numbers of a config that make no sense."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def out_of_range(config: Any, *, above_0: Collection[str], not_below_0: Collection[str]) -> list[str]:
    """The fields of a config that must be above 0, or not below 0, and are not; and all that are not finite. Each in
    words, such as "lr must be above 0, found -1.0". A field may be None, or a tuple of numbers."""
    wrong = []
    for name, value in vars(config).items():
        values = value if isinstance(value, tuple) else (value,)
        numbers = [n for n in values if isinstance(n, (int, float))]
        if name in (*above_0, *not_below_0) and value is not None and len(numbers) < len(values):
            wrong.append(f"{name} must be a number, found {value!r}")
        elif not all(map(math.isfinite, numbers)):
            wrong.append(f"{name} must be finite, found {value}")
        elif name in above_0 and any(n <= 0 for n in numbers):
            wrong.append(f"{name} must be above 0, found {value}")
        elif name in not_below_0 and any(n < 0 for n in numbers):
            wrong.append(f"{name} must not be below 0, found {value}")
    return wrong
