"""Find repeats in millions of values, by their 64-bit hashes, with little memory besides the hashes themselves.

Shapes: N values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

_PARTS = 16
_START, _MIX, _STIR = (np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))


def repeats(
    hashes_N: np.ndarray[Any, Any], only_N: np.ndarray[Any, Any] | None = None
) -> Iterator[np.ndarray[Any, Any]]:
    """The places whose value is at an earlier place too; with `only_N` (bool), no other places are looked at. They are
    found for a sixteenth of all values at a time, since sorting takes three times the memory of what is sorted."""
    low_N = hashes_N.astype(np.uint8)  # the last eight bits; `&` of all would take as much memory as they do
    for part in range(_PARTS):
        mine_N = (low_N & (_PARTS - 1)) == part
        places = np.flatnonzero(mine_N if only_N is None else mine_N & only_N)
        values = hashes_N[places]
        order = np.argsort(values, kind="stable")
        values = values[order]
        yield places[order[1:][values[1:] == values[:-1]]]


def as_array(hashes: Any) -> np.ndarray[Any, Any]:
    """A growing array.array of hashes as int64 (N,), not copied."""
    return np.frombuffer(hashes, np.int64) if len(hashes) else np.empty(0, np.int64)


def hashes_of(strings: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A hash of 64 bits of each string, int64 (N,), the same in every process, unlike Python's own.

    Eight bytes at a time of all strings at once, mixed in as MurmurHash3's finaliser mixes: twice as fast as Python's
    hash of one string after the other.
    """
    binary = pa.concat_arrays(strings.cast(pa.large_binary()).chunks or [pa.array([], pa.large_binary())])
    _, offsets, data = binary.buffers()
    place_N = np.frombuffer(offsets, np.int64, len(binary) + 1, 8 * binary.offset)
    bytes_ = np.concatenate([np.frombuffer(data or b"", np.uint8), np.zeros(8, np.uint8)])
    word_at = np.ndarray(len(bytes_) - 7, "<u8", bytes_, strides=(1,))  # the eight bytes from any place on
    left_N = np.diff(place_N)
    hash_N = (left_N.astype(np.uint64) + _START) * _MIX
    for at in range(0, int(left_N.max(initial=0)), 8):
        rows = np.flatnonzero(left_N > at)
        beyond = np.maximum(8 - (left_N[rows] - at), 0).astype(np.uint64)  # bytes of the next string, which drop out
        mixed = (hash_N[rows] ^ (word_at[place_N[rows] + at] << (beyond * np.uint64(8)))) * _MIX
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _STIR
        hash_N[rows] = mixed ^ (mixed >> np.uint64(29))
    return hash_N.view(np.int64)
