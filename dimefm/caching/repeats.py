"""Find repeats in millions of values, by their 64-bit hashes, with little memory besides the hashes themselves.

Shapes: N values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_PARTS = 16


def repeats(
    hashes_N: np.ndarray[Any, Any], only_N: np.ndarray[Any, Any] | None = None
) -> Iterator[np.ndarray[Any, Any]]:
    """The places whose value is at an earlier place too; with `only_N` (bool), no other places are looked at. They are
    found for a sixteenth of all values at a time, since sorting takes three times the memory of what is sorted."""
    for part in range(_PARTS):
        mine_N = (hashes_N & (_PARTS - 1)) == part
        places = np.flatnonzero(mine_N if only_N is None else mine_N & only_N)
        values = hashes_N[places]
        order = np.argsort(values, kind="stable")
        values = values[order]
        yield places[order[1:][values[1:] == values[:-1]]]


def as_array(hashes: Any) -> np.ndarray[Any, Any]:
    """A growing array.array of hashes as int64 (N,), not copied."""
    return np.frombuffer(hashes, np.int64) if len(hashes) else np.empty(0, np.int64)
